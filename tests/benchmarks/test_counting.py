"""What is counted, against multiplications counted by hand."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.counting import MatrixWork
from lightning_rlhf.models.linear import OneDNNLinear

ROWS, WIDTH, OUT = 256, 256, 192


@pytest.mark.parametrize("enabled", [True, False])
def test_a_layer_costs_three_products_whoever_computes_them_and_two_if_it_is_frozen(enabled, monkeypatch):
    layer, x = OneDNNLinear(WIDTH, OUT), torch.randn(2, ROWS // 2, WIDTH, requires_grad=True)
    product = 2 * ROWS * WIDTH * OUT / 1e9
    before = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = enabled
        with MatrixWork() as work:
            layer(x).sum().backward()
        layer.requires_grad_(False)
        with MatrixWork() as frozen:
            layer(x).sum().backward()
    finally:
        torch.backends.mkldnn.enabled = before
    assert work.gflop == pytest.approx(3 * product)
    assert frozen.gflop == pytest.approx(2 * product)


def test_attention_is_two_products_forward_and_five_backward():
    # Backward: the scores anew, and a product for each gradient, those of queries, keys, values and weights.
    heads, n, width = 3, 20, 8
    q, k, v = (torch.randn(2, heads, n, width, requires_grad=True) for _ in range(3))
    with MatrixWork() as forward:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
    with MatrixWork() as backward:
        out.sum().backward()
    product = 2 * 2 * heads * n * n * width / 1e9
    assert forward.gflop == pytest.approx(2 * product)
    assert backward.gflop == pytest.approx(5 * product)
