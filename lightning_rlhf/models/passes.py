"""Passes over finished rollouts, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.reading import pieces


class Network(Protocol):
    """What reads responses with a decoder."""

    decoder: Decoder
    training: bool

    def train(self, mode: bool = True) -> object:
        """As a module's."""


@torch.no_grad()
def in_pieces(
    network: Network,
    read: Callable[[Rollouts], Tensor],
    rollouts: Rollouts,
    size: int,
    tokens: int | None = None,
    most: Callable[[int], int] = int,
) -> Float[Tensor, "batch response"]:
    """What a network says of every response token, dropout off and without gradients.

    Args:
        network: That reads.
        read: Says it of some of the rows, through the network.
        rollouts: What was written.
        size: Rows of a forward pass.
        tokens: Tokens of a forward pass instead, as in :func:`pieces`.
        most: Says, of the passes that this process needs, how many all make: where weights are sharded, as many as
            the process that needs most.

    Returns:
        In single precision or more, 0 in the padding.
    """
    said = torch.zeros_like(rollouts.old_logprobs)
    everything = torch.arange(len(rollouts), device=rollouts.response_mask.device)
    parts = pieces(rollouts, everything, network.decoder.line(rollouts) is not None, size, tokens)
    parts += parts[:1] * (most(len(parts)) - len(parts))
    was_training = network.training
    network.train(False)
    try:
        for rows in parts:
            piece = rollouts.select(rows).trimmed()
            said[rows, : piece.response_mask.shape[1]] = read(piece).float()
    finally:
        network.train(was_training)
    return torch.where(rollouts.response_mask, said, 0.0)
