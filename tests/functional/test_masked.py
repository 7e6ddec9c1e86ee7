"""Masked reductions: by hand, against numpy, and blind to what the mask leaves out."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.functional.masked import masked_mean, masked_sum, mean_and_variance, moments, whiten

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def ragged() -> tuple[Tensor, Tensor]:
    """Numbers, and a mask that counts 3, 0, 1 and 5 of a row, once with a hole."""
    x = torch.randn(4, 5, dtype=torch.float64) * 3.0 + 2.0
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    return x, mask


def counted(x: Tensor, mask: Tensor) -> np.ndarray:
    return x.numpy()[mask.numpy()]


def test_a_sum_and_a_mean_count_what_the_mask_counts() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert masked_sum(x, mask).item() == 37.0
    assert masked_sum(x, mask, dim=0).tolist() == [1.0, 0.0, 36.0]
    assert masked_sum(x, mask, dim=1).tolist() == [5.0, 32.0]
    assert masked_mean(x, mask).item() == pytest.approx(37.0 / 3.0, rel=1e-6)
    assert masked_mean(x, mask, dim=0).tolist() == [1.0, 0.0, 18.0]
    assert masked_mean(x, mask, dim=1).tolist() == [2.5, 32.0]


def test_a_mean_over_everything_is_not_a_mean_of_means() -> None:
    x, mask = ragged()
    assert masked_mean(x, mask).item() == pytest.approx(counted(x, mask).mean(), rel=1e-12)
    assert masked_mean(x, mask, dim=1).mean().item() != pytest.approx(counted(x, mask).mean(), rel=1e-3)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_lies_in_the_padding_changes_nothing(garbage: float) -> None:
    x, mask = ragged()
    dirty = torch.where(mask, x, garbage)
    for dim in (None, 0, 1):
        assert torch.equal(masked_sum(dirty, mask, dim), masked_sum(x, mask, dim))
        assert torch.equal(masked_mean(dirty, mask, dim), masked_mean(x, mask, dim))
    assert torch.equal(moments(dirty, mask), moments(x, mask))
    assert torch.equal(whiten(dirty, mask, moments(dirty, mask)), whiten(x, mask, moments(x, mask)))


def test_no_gradient_reaches_the_padding() -> None:
    x, mask = ragged()
    x = torch.where(mask, x, torch.nan).requires_grad_()
    (total,) = torch.autograd.grad(masked_sum(x, mask), x)
    (mean,) = torch.autograd.grad(masked_mean(x, mask), x)
    (mean_of_rows,) = torch.autograd.grad(masked_mean(x, mask, dim=1).sum(), x)
    assert torch.equal(total, mask.double())
    assert_close(mean, mask.double() / 9.0, **CLOSE)
    lengths = torch.tensor([[3.0], [1.0], [1.0], [5.0]], dtype=torch.float64)  # the second row has none to divide
    assert_close(mean_of_rows, mask / lengths, **CLOSE)


@pytest.mark.invariant(31)
def test_where_nothing_counts_the_sum_the_mean_and_their_gradients_are_zero() -> None:
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for reduced in (masked_sum(x, nothing), masked_mean(x, nothing), masked_mean(x, nothing, dim=1).sum()):
        assert reduced.item() == 0.0
        assert torch.equal(torch.autograd.grad(reduced, x)[0], torch.zeros(2, 3))
    assert moments(x, nothing).tolist() == [0.0, 0.0, 0.0]
    assert [part.item() for part in mean_and_variance(moments(x, nothing))] == [0.0, 0.0]
    assert torch.equal(whiten(x, nothing, moments(x, nothing)), torch.zeros(2, 3))


def test_moments_are_count_sum_and_sum_of_squares() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 100.0]])
    assert moments(x, torch.tensor([[True, True], [True, False]])).tolist() == [3.0, 2.0, 14.0]
    assert moments(x).tolist() == [4.0, 102.0, 10014.0]


def test_moments_are_taken_in_double_precision_and_without_gradient() -> None:
    x = torch.tensor([0.1], dtype=torch.bfloat16, requires_grad=True)
    taken = moments(x.expand(1000))
    assert taken.dtype == torch.float64
    assert not taken.requires_grad
    tenth = 0.10009765625  # the bfloat16 nearest to 0.1
    assert taken.tolist() == pytest.approx([1000.0, 1000.0 * tenth, 1000.0 * tenth**2], rel=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
def test_mean_and_variance_are_those_of_numpy(ddof: int) -> None:
    x, mask = ragged()
    mean, variance = mean_and_variance(moments(x, mask), ddof)
    assert mean.item() == pytest.approx(counted(x, mask).mean(), rel=1e-12)
    assert variance.item() == pytest.approx(counted(x, mask).var(ddof=ddof), rel=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
def test_every_row_of_moments_has_its_own_mean_and_variance(ddof: int) -> None:
    x, mask = ragged()
    means, variances = mean_and_variance(torch.stack([moments(*row) for row in zip(x, mask, strict=True)]), ddof)
    kept = [counted(*row) for row in zip(x, mask, strict=True)]
    assert means.tolist() == pytest.approx([row.mean() if len(row) else 0.0 for row in kept], rel=1e-12)
    expected = [row.var(ddof=ddof) if len(row) > ddof else 0.0 for row in kept]  # none for no entry, or one of a sample
    assert variances.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_variance_survives_a_mean_a_million_times_its_root() -> None:
    x = torch.tensor([1e6 - 1.0, 1e6 + 1.0])
    assert mean_and_variance(moments(x))[1].item() == pytest.approx(1.0, rel=1e-3)


def test_a_variance_is_never_negative_however_sums_are_rounded() -> None:
    for size in range(1, 50):
        same = torch.full((size,), 1e8 / 3.0, dtype=torch.float64)
        assert mean_and_variance(moments(same))[1].item() >= 0.0
        assert whiten(same, same > 0, moments(same)).isfinite().all()


@pytest.mark.invariant(24)
def test_whitened_entries_that_count_have_mean_0_and_variance_1() -> None:
    x, mask = ragged()
    whitened = whiten(torch.where(mask, x, 1e6), mask, moments(x, mask), eps=0.0)
    assert counted(whitened, mask).mean() == pytest.approx(0.0, abs=1e-12)
    assert counted(whitened, mask).var() == pytest.approx(1.0, rel=1e-12)
    assert torch.equal(whitened[~mask], torch.zeros(11, dtype=torch.float64))
    assert_close(whitened[mask].numpy(), (counted(x, mask) - counted(x, mask).mean()) / counted(x, mask).std(), **CLOSE)


@pytest.mark.invariant(24)
def test_moments_of_two_halves_whiten_both_as_the_whole() -> None:
    x, mask = ragged()
    whole = whiten(x, mask, moments(x, mask))
    summed = moments(x[:1], mask[:1]) + moments(x[1:], mask[1:])
    halves = [whiten(x[:1], mask[:1], summed), whiten(x[1:], mask[1:], summed)]
    assert_close(torch.cat(halves), whole, **CLOSE)
    alone = whiten(x[:1], mask[:1], moments(x[:1], mask[:1]))
    assert (alone - whole[:1]).abs().max() > 0.1  # a half by itself is another scale


@pytest.mark.invariant(24)
def test_more_padding_whitens_no_differently() -> None:
    x, mask = ragged()
    wide, wide_mask = torch.cat([x, x + 50.0], dim=1), torch.cat([mask, torch.zeros_like(mask)], dim=1)
    assert_close(whiten(wide, wide_mask, moments(wide, wide_mask))[:, :5], whiten(x, mask, moments(x, mask)), **CLOSE)


def test_whitening_by_hand() -> None:
    x = torch.tensor([2.0, 4.0, 9.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False])  # mean 3, variance 1 as a population
    assert_close(whiten(x, mask, moments(x, mask), eps=0.0), torch.tensor([-1.0, 1.0, 0.0]).double(), **CLOSE)
    assert_close(
        whiten(x, mask, moments(x, mask), center=False, eps=0.0), torch.tensor([2.0, 4.0, 0.0]).double(), **CLOSE
    )
    assert_close(whiten(x, mask, moments(x, mask), eps=3.0), torch.tensor([-0.5, 0.5, 0.0]).double(), **CLOSE)


def test_whitening_does_not_see_a_shift_or_a_scale() -> None:
    x, mask = ragged()
    moved = 7.0 * x - 3.0
    assert_close(
        whiten(moved, mask, moments(moved, mask), eps=0.0), whiten(x, mask, moments(x, mask), eps=0.0), **CLOSE
    )


def test_without_centring_the_mean_stays_in_units_of_the_deviation() -> None:
    x, mask = ragged()
    scaled = whiten(x, mask, moments(x, mask), center=False, eps=0.0)
    kept = counted(x, mask)
    assert counted(scaled, mask).mean() == pytest.approx(kept.mean() / kept.std(), rel=1e-12)


def test_equal_entries_whiten_to_zero() -> None:
    x, mask = torch.full((2, 3), 1.5), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(whiten(x, mask, moments(x, mask)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_whitening_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=dtype)
    whitened = whiten(x, torch.ones_like(x, dtype=torch.bool), moments(x), eps=0.0)
    expected = [(number - 3.0) / math.sqrt(3.5) for number in (1.0, 2.0, 3.0, 6.0)]
    assert torch.equal(whitened, torch.tensor(expected, dtype=torch.float64).to(dtype))
