"""Rows to evaluate on: each once, over however many processes."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import DistributedSampler


class EvaluationSampler(DistributedSampler):
    """Row numbers of one rank, in order: row ``j`` of rank ``r`` is the one at ``j * world_size + r``.

    Where the ranks would not come out even, the first rows repeat, so that no rank waits for another; :func:`is_filler`
    marks them. It is a ``DistributedSampler`` so that Lightning leaves it in place.

    Args:
        rows: The data.
        world_size: Number of processes.
        rank: Of this one.
    """

    def __init__(self, rows: Sized, world_size: int, rank: int) -> None:
        super().__init__(rows, num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]


def is_filler(loader: Any, number: int) -> bool:
    """Whether a row is there only because the ranks would not have come out even.

    Args:
        loader: That it came from, ours or one to which Lightning gave a ``DistributedSampler``.
        number: Of the row, counted over all ranks: ``j * world_size + r``.

    Returns:
        Whether it repeats another.
    """
    # In prediction Lightning hides the sampler in a wrapped batch sampler.
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return isinstance(sampler, DistributedSampler) and number >= len(sampler.dataset)  # type: ignore[arg-type]
