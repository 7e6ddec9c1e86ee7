"""Small networks on top of a language model's states."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
        states = states.to(self.out.weight.dtype)
        values = self.out(torch.relu(self.hidden(states if self.scale == 1.0 else self.scale * states)))
        return torch.squeeze_copy(values, -1)  # a shard's outputs are no views: FSDP2 warns of them
