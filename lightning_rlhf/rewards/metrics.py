"""Metrics that users write, for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.dotted import imported
from lightning_rlhf.rewards.functions import UserFunction, plain

MetricLike = Callable[..., Any] | str
"""A callable on prompts and responses that returns numbers by name, or its dotted name."""


class MetricFunction(UserFunction):
    """A callable that is called as a reward is, and returns numbers by name; they are checked.

    Args:
        function: The callable, or its dotted name. For every name it returns a list with one number per response
            (None where it does not apply), or one number for all of them.
        name: For errors; its own name by default.
    """

    argument, returns = "metric_fn", "a dict of numbers"

    def __init__(self, function: MetricLike, name: str | None = None) -> None:
        super().__init__(imported(function, self.argument) if isinstance(function, str) else function, name)

    def __call__(self, rollouts: Rollouts, tokenizer: Any) -> dict[str, list[float]]:
        """Measures every response.

        Args:
            rollouts: What was written.
            tokenizer: Passed on if the function wants it.

        Returns:
            Numbers by name, one per response, NaN where there is none; a number for all stands for each of them.

        Raises:
            ValueError: If the result is no dict, or does not fit the responses.
            RuntimeError: If the function raised.
        """
        result = self.result(rollouts, self.call(rollouts, tokenizer))
        if not isinstance(result, Mapping) or not all(isinstance(name, str) and name for name in result):
            raise ValueError(
                f"`metric_fn` {self.name!r} returned {result!r}: it must return a dict, from the name of a metric to "
                "one number per response, or to one number."
            )
        return {name: self._numbers(name, plain(values), rollouts) for name, values in result.items()}

    def _numbers(self, name: str, values: Any, rollouts: Rollouts) -> list[float]:
        if not isinstance(values, list | tuple):
            return [self.number(values, f"{name!r}")] * len(rollouts)
        if len(values) != len(rollouts):
            raise ValueError(
                f"`metric_fn` {self.name!r} returned {len(values)} numbers as {name!r} for {len(rollouts)} responses: "
                "it must return one for each, in order, or one number."
            )
        return [
            math.nan if value is None else self.number(value, f"{name!r} of response {i} ({rollouts.responses[i]!r})")
            for i, value in enumerate(values)
        ]
