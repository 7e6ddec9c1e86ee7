"""The states that a model's head reads, where they are wanted and not what the head says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_rlhf.models.blocks import hooked, instead
from lightning_rlhf.models.reading import Reading, Responses

if TYPE_CHECKING:
    from lightning_rlhf.models.decoder import Decoder


def choosing(reading: Reading, states: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    """A hook by which a head reads only the states that predict something.

    Args:
        reading: What is being read.
        states: To which they are added.

    Returns:
        What is called before the head's forward.
    """

    def choose(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = last(inputs[0], reading.keep)
        if reading.chosen is None:
            states.append(kept.clone(memory_format=torch.contiguous_format))
            return inputs
        states.append(kept.flatten(0, 1).index_select(0, reading.chosen)[None])
        return states[-1], *inputs[1:]

    return choose


def head_states(decoder: Decoder, reading: Reading) -> Float[Tensor, "rows predicted width"]:
    """The states that predict something; the head's product, which is as wide as the vocabulary, is left out.

    Args:
        decoder: That reads.
        reading: The tokens.

    Returns:
        In the shape of the reading's targets, with gradients.
    """
    states: list[Tensor] = []
    head = decoder.model.get_output_embeddings()

    def skip(chosen: Tensor) -> Tensor:
        return chosen.new_zeros(()).expand(*chosen.shape[:-1], head.weight.shape[0])

    with hooked(head, choosing(reading, states)), instead(head, skip):
        decoder.run(reading)
    return states[-1]


def placed(values: Float[Tensor, ...], reading: Reading, batch: Responses) -> Float[Tensor, "batch response"]:
    """Puts values back to the response tokens that they are of, 0 elsewhere.

    Args:
        values: In the shape of the reading's targets.
        reading: Of the batch.
        batch: Prompts and responses.

    Returns:
        Entry ``t`` belongs to response token ``t``.
    """
    if reading.chosen is None:
        return values
    mask = batch.response_mask
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def last(values: Tensor, keep: int) -> Tensor:
    """The last positions; what has no others is no slice, whose gradient would be copied into zeros.

    Args:
        values: (batch, positions, ...).
        keep: How many.

    Returns:
        (batch, keep, ...).
    """
    return values if values.shape[1] == keep else values[:, -keep:]
