"""From text to padded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_rlhf.models.texts import ended, prompt_ids, response_ids

__all__ = ["ended", "pad_id", "padded", "prompt_ids", "response_ids"]


def pad_id(tokenizer: Any) -> int:
    """What fills rows; masks come from lengths, so it does not matter what it is."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def padded(
    rows: Sequence[Sequence[int]], pad: int, side: str
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Rows of different lengths as one tensor, and its mask.

    Args:
        rows: Tokens.
        pad: What fills them up.
        side: Where: ``"left"`` or ``"right"``.

    Returns:
        Tokens, and True where one is real.
    """
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = True
    return tokens, mask
