"""Rewards by rule for what no response should be: too long, too short, or the same again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_rlhf.rewards.rules import Rule

Unit = Literal["tokens", "words", "characters"]
"""What a response is counted in: the policy's tokens, the ending EOS included; words between spaces; or characters."""

UNITS = ("tokens", "words", "characters")


@dataclass(frozen=True)
class LengthPenalty(Rule):
    r"""0 for a response of a fitting length, down to -1 for one that is too long or too short.

    .. math::

        r = -\operatorname{clip}\Bigl(\frac{n - (n_{\max} - w)}{w}, 0, 1\Bigr)
            -\operatorname{clip}\Bigl(\frac{(n_{\min} + w) - n}{w}, 0, 1\Bigr)

    for a length n; without a ramp, at w = 0, -1 beyond the limits and 0 within. The first term is the soft overlong
    punishment of `DAPO <https://arxiv.org/abs/2503.14476>`_, eq. 13.

    Args:
        max_length: From where on the penalty is whole, :math:`n_{\max}`; None is no limit.
        min_length: Likewise down to where, :math:`n_{\min}`; None is no limit.
        ramp: Over how many units it grows, before the limit is reached, :math:`w`.
        unit: What is counted.

    Example:
        >>> LengthPenalty(max_length=4, ramp=2, unit="words")(["a"] * 4, ["1 2", "1 2 3", "1 2 3 4", "1 2 3 4 5"])
        [0.0, -0.5, -1.0, -1.0]
    """

    name = "length_penalty"

    max_length: int | None = None
    min_length: int | None = None
    ramp: int = 0
    unit: Unit = "tokens"

    def __post_init__(self) -> None:
        """Refuses limits between which there is nothing."""
        check_unit(self.unit)
        limits = {"max_length": self.max_length, "min_length": self.min_length}
        if all(limit is None for limit in limits.values()):
            raise ValueError("`max_length=None` and `min_length=None` penalise no length: give one of them.")
        for argument, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"`{argument}={limit}` must be at least 1, or None for no limit.")
        if self.ramp < 0:
            raise ValueError(f"`ramp={self.ramp}` must not be negative.")
        if self.max_length is not None and self.max_length - self.ramp < (self.min_length or -self.ramp) + self.ramp:
            raise ValueError(
                f"`max_length={self.max_length}` leaves no length without a penalty, with `min_length="
                f"{self.min_length}` and `ramp={self.ramp}`: raise it."
            )

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], response_tokens: Sequence[Tensor] | None = None
    ) -> list[float]:
        """Scores responses.

        Args:
            prompts: Not read.
            responses: What was written.
            response_tokens: As it was sampled.

        Returns:
            A number from -1 to 0 each.
        """
        lengths = [len(row) for row in units(responses, response_tokens, self.unit)]
        too_long = [0.0 if self.max_length is None else self._share(n - self.max_length) for n in lengths]
        too_short = [0.0 if self.min_length is None else self._share(self.min_length - n) for n in lengths]
        return [0.0 - high - low for high, low in zip(too_long, too_short, strict=True)]

    def _share(self, beyond: int) -> float:
        """How much of the penalty a length gets that is so far beyond a limit."""
        return float(beyond > 0) if self.ramp == 0 else min(max((beyond + self.ramp) / self.ramp, 0.0), 1.0)


@dataclass(frozen=True)
class RepetitionPenalty(Rule):
    r"""0 for a response that says nothing twice, towards -1 the more of its n-grams were there before.

    .. math:: r = \frac{|\text{unique n-grams}|}{|\text{n-grams}|} - 1

    The negative of seq-rep-n of `Neural text generation with unlikelihood training
    <https://arxiv.org/abs/1908.04319>`_. A response of fewer than n units has 0.

    Args:
        n: Units of an n-gram; 4 in the paper.
        unit: What they are made of.

    Example:
        >>> RepetitionPenalty(n=1, unit="words")(["a", "b"], ["yes yes yes yes", "yes and no"])
        [-0.75, 0.0]
    """

    name = "repetition_penalty"

    n: int = 4
    unit: Unit = "tokens"

    def __post_init__(self) -> None:
        """Refuses n-grams of nothing."""
        check_unit(self.unit)
        if self.n < 1:
            raise ValueError(f"`n={self.n}` must be at least 1.")

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], response_tokens: Sequence[Tensor] | None = None
    ) -> list[float]:
        """Scores responses.

        Args:
            prompts: Not read.
            responses: What was written.
            response_tokens: As it was sampled.

        Returns:
            A number from -1 to 0 each.
        """
        scores = []
        for row in units(responses, response_tokens, self.unit):
            ngrams = [tuple(row[i : i + self.n]) for i in range(len(row) - self.n + 1)]
            scores.append(len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0)
        return scores


def units(responses: Sequence[str], response_tokens: Sequence[Tensor] | None, unit: Unit) -> list[list[Any]]:
    """Takes responses apart.

    Args:
        responses: What was written.
        response_tokens: As it was sampled.
        unit: Into what.

    Returns:
        The units of each, in order.

    Raises:
        ValueError: If they are to be tokens, and there are none.
    """
    if unit == "characters":
        return [list(response) for response in responses]
    if unit == "words":
        return [response.split() for response in responses]
    if response_tokens is None:
        raise ValueError("`unit='tokens'` needs `response_tokens`: pass them, or count words or characters.")
    return [tokens.tolist() for tokens in response_tokens]


def check_unit(unit: str) -> None:
    """Refuses what a response is not made of.

    Args:
        unit: To be counted.

    Raises:
        ValueError: If it is none.
    """
    if unit not in UNITS:
        raise ValueError(f"`unit={unit!r}` must be one of {', '.join(map(repr, UNITS))}.")
