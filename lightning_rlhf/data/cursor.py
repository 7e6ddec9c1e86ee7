"""Where training stands in its data, so that a resumed run goes on there."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass

import torch
from torch.utils.data import DistributedSampler

from lightning_rlhf.chance import derived_seed


@dataclass
class Cursor:
    """How far the data was consumed, in passes and in batches of the present one."""

    epoch: int = 0
    position: int = 0

    def advance(self, batches: float) -> None:
        """One batch on; after ``batches`` of them a new pass begins."""
        self.position += 1
        if self.position >= batches:
            self.epoch, self.position = self.epoch + 1, 0


class CursorSampler(DistributedSampler):
    """Row numbers of one rank, from the cursor on, in an order that (seed, epoch) alone decide.

    It is a ``DistributedSampler`` so that Lightning leaves it in place, and deals rows as that does: row ``j`` of rank
    ``r`` is the one at ``j * world_size + r``, and some repeat where the ranks would not come out even. Lightning's
    ``set_epoch`` changes nothing: the epoch is the cursor's.

    Args:
        rows: The data.
        cursor: Shared with the DataModule, and read whenever a pass begins.
        batch_size: Rows of a batch, per process.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the orders.
        world_size: Number of processes.
        rank: Of this one.
    """

    def __init__(
        self, rows: Sized, cursor: Cursor, batch_size: int, shuffle: bool, seed: int, world_size: int, rank: int
    ) -> None:
        super().__init__(rows, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.cursor = cursor
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "shuffle", self.cursor.epoch))
            order = torch.randperm(count, generator=generator)
        else:
            order = torch.arange(count)
        mine = order[torch.arange(self.rank, self.total_size, self.num_replicas) % count]
        return iter(mine[self.cursor.position * self.batch_size :].tolist())
