"""Texts without words, as the networks of a run read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.encoder_decoder import EncoderDecoder
from lightning_rlhf.models.reading import Reading, Source, positions_of
from lightning_rlhf.models.states import head_states
from lightning_rlhf.planning.outlines import Network


@dataclass(frozen=True)
class Rows:
    """Texts of a pass, all of the greatest length.

    Attributes:
        count: How many.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
    """

    count: int
    prompt: int
    response: int

    @property
    def columns(self) -> int:
        """Tokens that a decoder-only model reads in order to predict a response."""
        return self.prompt + self.response - 1


def reading(decoder: Decoder, rows: Rows) -> Reading:
    """Texts as a decoder reads them in order to say something of their states.

    Args:
        decoder: That reads.
        rows: The texts.

    Returns:
        What is read.
    """
    prompt, source = torch.zeros(rows.count, rows.prompt, dtype=torch.long), None
    begun = prompt
    if isinstance(decoder, EncoderDecoder):
        source = Source(prompt, torch.ones_like(prompt, dtype=torch.bool))
        begun = torch.zeros(rows.count, len(decoder.prefix), dtype=torch.long)
    targets = torch.zeros(rows.count, rows.response, dtype=torch.long)
    tokens = torch.cat([begun, targets[:, 1:]], dim=1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Reading(tokens, positions_of(mask), mask, rows.response, targets, source=source)


def values_of(critic: Network, rows: Rows) -> Tensor:
    """Values that a network of its own says.

    Args:
        critic: The network.
        rows: Texts.

    Returns:
        (batch, response).
    """
    assert critic.value is not None
    return critic.value(head_states(critic.decoder, reading(critic.decoder, rows)))
