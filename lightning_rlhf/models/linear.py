"""Linear layers whose products oneDNN computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.functional.linear import onednn, packed, product
from lightning_rlhf.models.blocks import instead


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


@contextmanager
def packed_linears(model: nn.Module, rows: int, but: Sequence[str] = ()) -> Iterator[None]:
    """Lets linear layers that train read copies of their weights, packed for oneDNN, while these stay the same.

    A step of decoding reads every weight for a few rows, and takes a third less time so. A copy is as large as the
    weight's gradient, which there is none of while responses are written: it takes no memory that is not needed later.

    Args:
        model: After :func:`speed_up_linears`.
        rows: Of a step.
        but: Names of modules that steps do not run, such as an encoder's blocks.
    """
    left_out = tuple(f"{name}." for name in but)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            is_ours = isinstance(module, OneDNNLinear | OneDNNConv1D) and not f"{name}.".startswith(left_out)
            if is_ours and module.weight.requires_grad:
                weight = module.weight if isinstance(module, OneDNNLinear) else module.weight.t()
                copy = packed(weight, rows)
                if copy is not None:
                    stack.enter_context(instead(module, _Packed(copy, module.bias)))
        yield


class _Packed:
    """What such a layer does meanwhile."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return onednn(x, self.weight, self.bias)
