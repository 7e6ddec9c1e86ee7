"""Large pieces of a processor's memory, used again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 2**25
"""Bytes from which a piece is worth keeping, 32 MiB: what is larger, the C library asks the system for every time."""


class Spare:
    """Large pieces of memory that one pass has done with, for the next.

    The system clears every page that is written to for the first time, which takes several times as long as to write to
    it again. A GPU's memory is torch's own to keep.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, torch.UntypedStorage] = {}

    def take(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor with anything in it.

        Args:
            use: What it is for; each use has a piece of its own.
            shape: Of the tensor.
            like: Of whose type and device it is.

        Returns:
            In the piece that was given for this use, if it is large enough, else in fresh memory.
        """
        piece = self._pieces.pop(use, None)
        count = torch.Size(shape).numel()
        if piece is None or piece.device != like.device or piece.nbytes() < count * like.itemsize:
            return like.new_empty(shape)
        return torch.empty(0, dtype=like.dtype, device=like.device).set_(piece)[:count].view(shape)

    def give(self, use: str, piece: torch.UntypedStorage) -> None:
        """Keeps a piece for :meth:`take`, unless it is small, no processor's, or there is a tensor in it still.

        Args:
            use: As there.
            piece: Of a tensor that is gone.
        """
        is_large = piece.device.type == "cpu" and piece.nbytes() >= SMALLEST
        if is_large and torch._C._storage_Use_Count(piece._cdata) == 1:
            self._pieces[use] = piece

    def clear(self) -> None:
        """Gives everything back to the system."""
        self._pieces.clear()
