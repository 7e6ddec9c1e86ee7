"""Products with weights, computed by oneDNN where that is what a processor does best."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**23
"""Multiplications of a product from which calling oneDNN pays; below, the call itself takes longer."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Like ``torch.nn.functional.linear``.

    Args:
        x: (..., in).
        weight: (out, in), of any strides.
        bias: (out,).

    Returns:
        (..., out).
    """
    if not suits(x, weight):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Product.apply(x, weight, bias)
    return onednn(x, weight, bias)


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """The same without a gradient, written where it is to be.

    Args:
        out: (rows, out), filled.
        x: (rows, in).
        weight: (out, in), of any strides.
    """
    if suits(x, weight):
        out.copy_(onednn(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


@functools.cache
def is_of_intel() -> bool:
    """Whether the processor is Intel's, for which torch's own product, by MKL, is fast too.

    There oneDNN is up to twice as fast at few rows and alike at many, but copies what lies on its side and loses a
    third by it. On other processors it is faster in every case.

    Returns:
        The answer; False where torch does not say.
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name", "")).startswith("Intel")


def suits(x: Tensor, weight: Tensor, is_packed: bool = False) -> bool:
    """Whether oneDNN is asked: large products in single precision on a CPU; on Intel's of rows that lie upright.

    Args:
        x: (..., in).
        weight: (out, in).
        is_packed: Whether the weight will be, however it lies.

    Returns:
        The answer.
    """
    return bool(
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and is_large(x.numel() // max(1, x.shape[-1]), weight)
        and type(weight) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and (is_packed or (x.stride(-1) == 1 and weight.stride(-1) == 1) or not is_of_intel())
    )


def is_large(rows: int, weight: Tensor) -> bool:
    """Whether a product is large enough for oneDNN.

    Args:
        rows: That are multiplied.
        weight: (out, in).

    Returns:
        The answer.
    """
    return rows * weight.numel() >= SMALLEST


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product itself, without a gradient.

    Args:
        x: (..., in).
        weight: (out, in), of any strides.
        bias: (out,).

    Returns:
        (..., out).
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packs(weight: Tensor, rows: int) -> bool:
    """Whether a copy of a weight for :func:`onednn` alone is worth while.

    Args:
        weight: (out, in), of any strides.
        rows: That are multiplied by it at a time.

    Returns:
        The answer.
    """
    if type(weight) not in (Tensor, nn.Parameter):  # a shard, which is not to be asked for anything
        return False
    return suits(weight.new_empty(1).expand(rows, weight.shape[1]), weight, is_packed=True)


def packed(weight: Tensor, rows: int) -> Tensor:
    """Such a copy, in the order in which oneDNN reads a weight, which it would otherwise bring about at every product.

    Args:
        weight: (out, in), of any strides.
        rows: That are multiplied by it at a time.

    Returns:
        What :func:`onednn` takes for the weight, and nothing else does.
    """
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return copy


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = product(grad, weight.t()) if wants_x else None
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_weight = None
        if wants_weight:  # with the weight's own strides, so that it can be kept as it is
            is_upright = weight.is_contiguous()
            grad_weight = product(grads.t(), rows.t()) if is_upright else product(rows.t(), grads.t()).t()
        return grad_x, grad_weight, grads.sum(0) if wants_bias else None
