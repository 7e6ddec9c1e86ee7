"""Linear layers whose products oneDNN computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_rlhf.functional.head import head_bytes
from lightning_rlhf.functional.linear import is_large, onednn, packed, packs, product
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
def packed_linears(model: Any, rows: int, tokens: int, but: Sequence[str] = ()) -> Iterator[None]:
    """Lets linear layers read copies of their weights, packed for oneDNN, for as long as these stay the same.

    A step of decoding reads every weight for a few rows, and takes a third less time so. Copies are made for as many
    layers as there is memory that updates take later, and that nothing takes while responses are written: gradients of
    what trains, and what lies between the passes of the head.

    Args:
        model: After :func:`speed_up_linears`.
        rows: Of a step.
        tokens: Of responses that a backward pass learns from.
        but: Names of modules that steps do not run, such as an encoder's blocks.
    """
    with ExitStack() as stack:
        for module, weight in _copied(model, tokens, [pair for pair in _linears(model, but) if packs(pair[1], rows)]):
            stack.enter_context(instead(module, _Packed(packed(weight, rows), module.bias)))
        yield


def packed_bytes(model: Any, rows: int, tokens: int, but: Sequence[str] = ()) -> int:
    """Memory that :func:`packed_linears` takes, in single precision on a CPU.

    Args:
        model: As there; it need not have numbers.
        rows: As there.
        tokens: As there.
        but: As there.

    Returns:
        The bytes.
    """
    found = [(module, weight) for module, weight in _linears(model, but) if is_large(rows, weight)]
    found = [(module, weight) for module, weight in found if weight.dtype is torch.float32]
    return sum(weight.nbytes for _, weight in _copied(model, tokens, found))


def _copied(model: Any, tokens: int, layers: Sequence[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """Those for which there is memory; the head, whose product is large and gains least, comes last."""
    head: Any = model.get_output_embeddings()
    vocabulary, width = head.weight.shape
    exponentials, _, _ = head_bytes(tokens, vocabulary, width, head.weight.dtype)
    left = exponentials + sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    for module, weight in sorted(layers, key=lambda layer: layer[0] is head):
        if weight.nbytes <= left:
            left -= weight.nbytes
            yield module, weight


def _linears(model: nn.Module, but: Sequence[str]) -> Iterator[tuple[Any, Tensor]]:
    """Linear layers, and their weights, (out, in)."""
    left_out = tuple(f"{name}." for name in but)
    for name, module in model.named_modules():
        is_known = type(module) in (OneDNNLinear, OneDNNConv1D, nn.Linear, Conv1D)
        if is_known and not f"{name}.".startswith(left_out):
            yield module, module.weight.t() if isinstance(module, Conv1D) else module.weight


class _Packed:
    """What such a layer does meanwhile."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return onednn(x, self.weight, self.bias)
