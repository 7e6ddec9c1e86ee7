"""Reward functions that users write: what they are called with, and what may come back."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.rewards.threads import begun, finished

Reward = Callable[..., Any]
"""Prompts and responses in; one score per response out, or one list of per-token scores per response."""


class UserFunction:
    """A callable of the user's with a name; what it is called with, and what numbers may come back.

    Args:
        function: Gets ``prompts`` and ``responses``, and by keyword whatever else it names (all there is, if it takes
            ``**kwargs``): the other keys of the prompts' rows, ``response_tokens`` and ``tokenizer``.
        name: For logs and errors; its own name by default.
    """

    argument: str  # what the user calls it, for errors
    returns: str  # what it must return, likewise

    def __init__(self, function: Reward, name: str | None = None) -> None:
        if not callable(function):
            raise TypeError(
                f"`{self.argument}={function!r}` must be callable: it gets prompts and responses, and returns "
                f"{self.returns}."
            )
        self.function = function
        self.name = name or own_name(function)
        self.named, self.takes_all = parameters_of(function)
        self.is_awaited = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    def call(self, rollouts: Rollouts, tokenizer: Any) -> Any:
        """Calls the function; what is to be awaited is begun.

        Args:
            rollouts: What was written.
            tokenizer: Passed on if the function wants it.

        Returns:
            What it returned, or what that comes to.

        Raises:
            RuntimeError: If the function raised.
        """
        arguments = self._arguments(rollouts, tokenizer)
        positional = () if {"prompts", "responses"} & self.named else (rollouts.prompts, rollouts.responses)
        with self._blamed(rollouts):
            given = self.function(*positional, **arguments)
            return begun(given) if inspect.isawaitable(given) else given

    def result(self, rollouts: Rollouts, given: Any) -> Any:
        """What the function says, once it is there, tensors and arrays as lists and generators run out.

        Args:
            rollouts: What was written.
            given: What :meth:`call` returned.

        Raises:
            RuntimeError: If the function raised.
        """
        with self._blamed(rollouts):
            result = plain(finished(given) if isinstance(given, Future) else given)
            if isinstance(result, Iterable) and not isinstance(result, str | Mapping):
                return [plain(item) for item in result]  # where a generator raises
        return result

    @contextmanager
    def _blamed(self, rollouts: Rollouts) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RuntimeError(
                f"`{self.argument}` {self.name!r} raised {type(error).__name__}: {error} (on {len(rollouts)} "
                f"responses, the first of which is {rollouts.responses[0]!r})"
            ) from error

    def number(self, value: Any, what: str) -> float:
        """A finite number.

        Args:
            value: What the function gave.
            what: For which sample, for errors.

        Raises:
            ValueError: If it is none.
        """
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"`{self.argument}` {self.name!r} gave {value!r} for {what}: it must be a number."
            ) from error
        if not abs(number) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"`{self.argument}` {self.name!r} gave {number} for {what}: it must be finite, in single precision."
            )
        return number

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


class RewardFunction(UserFunction):
    """A reward, whose result is checked."""

    argument, returns = "reward", "scores"

    def __call__(self, rollouts: Rollouts, tokenizer: Any, given: Any = None) -> list[float] | list[list[float]]:
        """Scores every response.

        Args:
            rollouts: What was written.
            tokenizer: Passed on if the function wants it.
            given: What :meth:`call` returned, where that was called before.

        Returns:
            A number per response, or a list per response, one number a token; NaN where the reward does not apply.

        Raises:
            ValueError: If the result does not fit the responses; the sample is named.
            RuntimeError: If the function raised.
        """
        scores = self.result(rollouts, self.call(rollouts, tokenizer) if given is None else given)
        if not isinstance(scores, list):
            raise ValueError(
                f"`reward` {self.name!r} returned {scores!r}: it must return a list with one score per response."
            )
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
            math.nan if score is None else self.number(score, sample)
            for score, sample in zip(scores, samples, strict=True)
        ]

    def _dense(self, scores: Any, length: int, sample: str) -> list[float]:
        if scores is None:
            return [math.nan] * length
        if not isinstance(scores, list | tuple):
            raise ValueError(
                f"`reward` {self.name!r} gave {scores!r} for {sample}, and a list for another response: scores are one "
                "number per token of every response (None where it does not apply), or one number per response."
            )
        if len(scores) != length:
            raise ValueError(
                f"`reward` {self.name!r} gave {scores!r} for {sample}, which has {length} tokens, the ending EOS "
                "included: dense scores are one number per token."
            )
        return [self.number(score, f"token {t} of {sample}") for t, score in enumerate(scores)]


def plain(scores: Any) -> Any:
    """A tensor or array as numbers or lists of them; anything else as it is."""
    return scores.tolist() if hasattr(scores, "tolist") else scores


def own_name(function: Reward) -> str:
    """The name that its author gave a callable, an object's ``name`` included; else that of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    own = getattr(function, "__name__", None) or getattr(function, "name", None)
    return own if isinstance(own, str) else type(function).__name__


def parameters_of(function: Reward) -> tuple[frozenset[str], bool]:
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
