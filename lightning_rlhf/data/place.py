"""A DataModule that knows how much of its data is in the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import lightning as L

from lightning_rlhf.data.cursor import Cursor
from lightning_rlhf.data.settled import settled_batches
from lightning_rlhf.data.streaming import Stream


class PlacedDataModule(L.LightningDataModule):
    """Rows, and the place up to which training has consumed them.

    Attributes:
        rows: The training data.
        cursor: The place.
    """

    rows: Any

    def __init__(self) -> None:
        super().__init__()
        self.cursor = Cursor()
        self._settled = Cursor()  # the place behind which everything is in the weights
        self._due = 0  # batches that training has finished once the last one that was read is

    @property
    def _place(self) -> tuple[int, int]:
        """Number of processes, and of this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Moves the cursor: fires once for every batch that training consumes, before its step."""
        if self.trainer is not None and self.trainer.training:
            if self._is_settled():
                self._settled = replace(self.cursor)
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
            self._due = progress.total.processed + 1
            batches = self.rows.batches if isinstance(self.rows, Stream) else math.inf
            self.cursor.advance(min(self.trainer.num_training_batches, batches))
        return batch

    def _is_settled(self) -> bool:
        """Whether what was read is in the weights, and not a batch that is under way."""
        if self.trainer is None:
            return True
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.processed >= self._due and settled_batches(self.trainer) == progress.current.ready

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, up to which everything is in the weights."""
        place = self.cursor if self._is_settled() else self._settled
        state = {"epoch": place.epoch, "position": place.position}
        return state | ({"digest": self.rows.digest(place.position)} if isinstance(self.rows, Stream) else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to a saved place."""
        self.cursor.epoch, self.cursor.position = state_dict["epoch"], state_dict["position"]
        if isinstance(self.rows, Stream):
            self.rows.expect(self.cursor.epoch, self.cursor.position, state_dict.get("digest"))
