"""Linear layers whose products oneDNN computes."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.functional.linear import product


def speed_up_linears(model: nn.Module) -> None:
    """Lets the linear layers of a model be computed by oneDNN on a CPU, in single precision.

    By default torch asks MKL, which on processors other than Intel's leaves half of their rate unused. The function is
    the same but for rounding; classes derived from ``Linear`` and layers of another type, device or precision stay as
    they are, and so do names, weights and exports.

    Args:
        model: Changed in place.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is Conv1D:
            module.__class__ = OneDNNConv1D


class OneDNNLinear(nn.Linear):
    """A linear layer, computed by :func:`product`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """As ``Linear``."""
        return product(input, self.weight, self.bias)


class OneDNNConv1D(Conv1D):
    """A linear layer whose weight lies on its side, as OpenAI's models have it, computed by :func:`product`."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``Conv1D``."""
        return product(x, self.weight.t(), self.bias)
