"""What an encoder made of prompts, beside what a decoder has read since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(slots=True)
class Encoded:
    """What an encoder made of prompts, and what the decoder has read since; rows are selected and repeated in place.

    Attributes:
        states: Padded right.
        mask: True where a token is real.
        past: Keys and values of the decoder; None before it has read, or where it keeps none.
    """

    states: Float[Tensor, "batch prompt width"]
    mask: Bool[Tensor, "batch prompt"]
    past: Any = None

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keeps some of the rows.

        Args:
            indices: Of those.
        """
        self.states, self.mask = self.states[indices], self.mask[indices]
        if self.past is not None:
            self.past.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes several of every row, one after the other.

        Args:
            repeats: How many.
        """
        self.states, self.mask = (x.repeat_interleave(repeats, 0) for x in (self.states, self.mask))
        if self.past is not None:
            self.past.batch_repeat_interleave(repeats)
