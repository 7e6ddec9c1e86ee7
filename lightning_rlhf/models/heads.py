"""Small networks on top of a language model's states."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ValueHead(nn.Module):
    """Two layers that read the state before a token and say what reward is still to come.

    Linear to twice the width, ReLU, linear to one number, as in trlX.

    Args:
        width: Of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, 1)

    def forward(self, states: Float[Tensor, "batch response width"]) -> Float[Tensor, "batch response"]:
        """The value of every state."""
        values = self.out(torch.relu(self.hidden(states.to(self.out.weight.dtype))))
        return torch.squeeze_copy(values, -1)  # a shard's outputs are no views: FSDP2 warns of them
