"""Steps of decoding: from a cache that grows, or recorded once and played again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_rlhf.models.policy import NextToken, Policy

if TYPE_CHECKING:
    from lightning_rlhf.generation.recorder import Recorder

DROP_FINISHED_AT = 0.125
"""Share of finished rows from which they leave the batch: leaving copies the cache of those that stay."""


class Text(Protocol):
    """Everything written so far, prompt and response."""

    tokens: Int[Tensor, "rows total"]
    mask: Bool[Tensor, "rows total"]


class Steps:
    """Steps from a cache that grows with every token.

    Args:
        policy: In evaluation mode.
        cache: After the prompt was read; None where the whole text is read again.
    """

    def __init__(self, policy: Policy, cache: Any) -> None:
        self.policy = policy
        self.cache = cache

    def read(self, text: Text) -> NextToken:
        """Reads what has not been read yet.

        Args:
            text: So far.

        Returns:
            What the policy says of the token to come.
        """
        # What an encoder made of the prompt is no past of the response.
        has_past = getattr(self.cache, "past", self.cache) is not None
        step = self.policy.next_token(text.tokens[:, -1:] if has_past else text.tokens, text.mask, self.cache)
        self.cache = step.cache
        return step

    def staying(self, alive: Bool[Tensor, " rows"], remaining: int) -> Int[Tensor, " staying"] | None:
        """Which rows are read on, after some have ended.

        Args:
            alive: Those that have not.
            remaining: How many these are.

        Returns:
            Their numbers; None where all stay.
        """
        if len(alive) <= 1 or len(alive) - remaining < DROP_FINISHED_AT * len(alive):
            return None
        return alive.nonzero().squeeze(1) if remaining else alive.new_zeros(1, dtype=torch.long)

    def select(self, index: Int[Tensor, " staying"]) -> None:
        """Lets the others go.

        Args:
            index: Of :meth:`staying`.
        """
        if self.cache is not None:
            self.cache.batch_select_indices(index)


class RecordedSteps(Steps):
    """Steps that were recorded as CUDA graphs, one for each number of rows and of columns of the cache.

    A step launches hundreds of kernels, which takes longer than to run them; a graph is launched at once. Rows leave
    when half of them have ended, so that few graphs are needed.

    Args:
        policy: In evaluation mode.
        cache: After the prompt was read.
        text: The prompt.
        recorder: That has the graphs.
    """

    def __init__(self, policy: Policy, cache: Any, text: Text, recorder: Recorder) -> None:
        super().__init__(policy, cache)
        self.recorder = recorder
        self.rows = len(text.mask)
        recorder.fixed.fill(cache, text.mask)
        self._let_go()

    def read(self, text: Text) -> NextToken:
        """As there; at first in both ways, until it is known that they say the same."""
        recorder = self.recorder
        if not recorder.is_refused:
            recorder.fixed.advance(text.tokens[:, -1:])
            if recorder.is_trusted:
                return recorder.step(self.policy, self.rows)
        said = super().read(text)
        if not recorder.is_refused:
            recorder.try_on(self.policy, self.rows, said)
        self._let_go()
        return said

    def _let_go(self) -> None:
        if self.recorder.is_trusted and not self.recorder.is_refused:
            self.cache = None  # nobody reads it any more

    def staying(self, alive: Bool[Tensor, " rows"], remaining: int) -> Int[Tensor, " staying"] | None:
        """Those that have not ended and some that have, half as many or a quarter."""
        if self.recorder.is_refused:
            return super().staying(alive, remaining)
        count = len(alive)
        while count > 1 and (count + 1) // 2 >= remaining:
            count = (count + 1) // 2
        if count == len(alive) or not self.recorder.is_trusted:
            return None
        return (~alive).long().argsort(stable=True)[:count]

    def select(self, index: Int[Tensor, " staying"]) -> None:
        """As there."""
        if self.recorder.is_refused:
            super().select(index)
        else:
            self.recorder.fixed.select(index)
            self.rows = len(index)
