"""The matrix work that is really executed, padding and all, as torch sees it go by."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class MatrixWork(FlopCounterMode):
    """Counts the operations of all matrix products and attentions that run while it is entered.

    It knows what torch's own counter leaves out on a CPU: products that oneDNN is asked for, and fused attention, of
    which the square is counted although a causal kernel skips half of it.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)

    @property
    def gflop(self) -> float:
        """Of all so far, two operations for a multiplication."""
        return self.get_total_flops() / 1e9


def _product(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    """Of shapes (..., in) and (out, in)."""
    total = 2 * weight[0]
    for size in x:
        total *= size
    return total


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **({torch.ops.mkldnn._linear_pointwise: _product} if torch.backends.mkldnn.is_available() else {}),
}
