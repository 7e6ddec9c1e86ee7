"""Small networks on top of a language model's states."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

ValueHeadKind = Literal["mlp", "linear"]


class ValueHead(nn.Module):
    """Two layers that read the state before a token and say what reward is still to come.

    Linear to twice the width, ReLU, linear to one number, as in trlX.

    Args:
        width: Of the states.
        scale: What states are multiplied by first, where a model divides them for its own head
            (:func:`lightning_rlhf.models.probing.state_scale`).
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, 1)

    def forward(self, states: Float[Tensor, "batch response width"]) -> Float[Tensor, "batch response"]:
        """The value of every state."""
        states = _scaled(states, self.scale, self.out.weight.dtype)
        values = self.out(torch.relu(self.hidden(states)))
        return torch.squeeze_copy(values, -1)  # a shard's outputs are no views: FSDP2 warns of them


class LinearValueHead(nn.Module):
    """One linear layer that reads the state before a token and says what reward is still to come.

    Args:
        width: Of the states.
        scale: As in :class:`ValueHead`.
        score: Of a classifier with one label, whose weights are then where this begins.
    """

    def __init__(self, width: int, scale: float = 1.0, score: nn.Linear | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.out = nn.Linear(width, 1)
        if score is not None:
            with torch.no_grad():
                self.out.weight.copy_(score.weight)
                self.out.bias.zero_() if score.bias is None else self.out.bias.copy_(score.bias)

    def forward(self, states: Float[Tensor, "batch response width"]) -> Float[Tensor, "batch response"]:
        """The value of every state."""
        return torch.squeeze_copy(self.out(_scaled(states, self.scale, self.out.weight.dtype)), -1)


def _scaled(states: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    states = states.to(dtype)
    return states if scale == 1.0 else scale * states


HEADS: dict[str, type[ValueHead] | type[LinearValueHead]] = {"mlp": ValueHead, "linear": LinearValueHead}
"""By the name of their kind."""
