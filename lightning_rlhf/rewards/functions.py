"""Reward functions that users write: what they are called with, and what may come back."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.batches import Rollouts

Reward = Callable[..., Any]
"""Prompts and responses in; one score per response out, or one list of per-token scores per response."""


class RewardFunction:
    """A callable with a name, whose result is checked.

    Args:
        function: Gets ``prompts`` and ``responses``, and by keyword whatever else it names (all there is, if it takes
            ``**kwargs``): the other keys of the prompts' rows, ``response_tokens`` and ``tokenizer``.
        name: For logs and errors; its own name by default.
    """

    def __init__(self, function: Reward, name: str | None = None) -> None:
        if not callable(function):
            raise TypeError(
                f"`reward={function!r}` must be callable: it gets prompts and responses, and returns scores."
            )
        self.function = function
        self.name = name or _own_name(function)
        self.named, self.takes_all = _parameters(function)

    def __call__(self, rollouts: Rollouts, tokenizer: Any) -> list[float] | list[list[float]]:
        """Scores every response.

        Args:
            rollouts: What was written.
            tokenizer: Passed on if the function wants it.

        Returns:
            A number per response, NaN where the reward does not apply; or a list per response, one number a token.

        Raises:
            ValueError: If the result does not fit the responses; the sample is named.
            RuntimeError: If the function raised.
        """
        scores = self._checked_call(rollouts, tokenizer)
        if len(scores) != len(rollouts):
            raise ValueError(
                f"`reward` {self.name!r} returned {len(scores)} scores for {len(rollouts)} responses: it must return "
                "one for each, in order."
            )
        samples = [f"response {i} ({response!r})" for i, response in enumerate(rollouts.responses)]
        if any(isinstance(score, list | tuple) for score in scores):
            lengths = rollouts.response_mask.sum(1).tolist()
            return [
                self._dense(score, length, sample)
                for score, length, sample in zip(scores, lengths, samples, strict=True)
            ]
        return [
            math.nan if score is None else self._number(score, sample)
            for score, sample in zip(scores, samples, strict=True)
        ]

    def _checked_call(self, rollouts: Rollouts, tokenizer: Any) -> list[Any]:
        arguments = self._arguments(rollouts, tokenizer)
        positional = () if {"prompts", "responses"} & self.named else (rollouts.prompts, rollouts.responses)
        try:
            scores = _plain(self.function(*positional, **arguments))
            if isinstance(scores, Iterable) and not isinstance(scores, str):
                return [_plain(score) for score in scores]  # where a generator raises
        except Exception as error:
            raise RuntimeError(
                f"`reward` {self.name!r} raised {type(error).__name__}: {error} (on {len(rollouts)} responses, the "
                f"first of which is {rollouts.responses[0]!r})"
            ) from error
        raise ValueError(
            f"`reward` {self.name!r} returned {scores!r}: it must return a list with one score per response."
        )

    def _arguments(self, rollouts: Rollouts, tokenizer: Any) -> dict[str, Any]:
        offered: dict[str, Any] = dict(rollouts.metadata)
        wanted = self.named - {"prompts", "responses"}
        if self.takes_all or "response_tokens" in wanted:
            offered["response_tokens"] = [
                tokens[mask] for tokens, mask in zip(rollouts.response_tokens, rollouts.response_mask, strict=True)
            ]
        offered["tokenizer"] = tokenizer
        if {"prompts", "responses"} & self.named:
            offered |= {"prompts": rollouts.prompts, "responses": rollouts.responses}
        return {key: value for key, value in offered.items() if self.takes_all or key in self.named}

    def _number(self, score: Any, sample: str) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"`reward` {self.name!r} gave {score!r} for {sample}: it must be a number.") from error
        if not abs(number) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"`reward` {self.name!r} gave {number} for {sample}: it must be finite, in single precision."
            )
        return number

    def _dense(self, scores: Any, length: int, sample: str) -> list[float]:
        if not isinstance(scores, list | tuple) or len(scores) != length:
            raise ValueError(
                f"`reward` {self.name!r} gave {scores!r} for {sample}, which has {length} tokens, the ending EOS "
                "included: dense scores are one number per token."
            )
        return [self._number(score, f"token {t} of {sample}") for t, score in enumerate(scores)]


def _plain(scores: Any) -> Any:
    """A tensor or array as numbers or lists of them; anything else as it is."""
    return scores.tolist() if hasattr(scores, "tolist") else scores


def _own_name(function: Reward) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def _parameters(function: Reward) -> tuple[frozenset[str], bool]:
    """Names that a function can be passed by, and whether it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset(), False
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(by_name), any(p.kind is p.VAR_KEYWORD for p in parameters)


def as_tensor(scores: Sequence[Any], device: torch.device) -> Tensor:
    """Scores in single precision, whatever the default type is."""
    return torch.tensor(scores, dtype=torch.float32, device=device)
