"""Value objectives: by hand, in value and gradient, and limits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.functional.value import clipped_value_loss

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    values, old_values, returns = torch.randn(3, 4, 25, dtype=torch.float64)
    return values, old_values, returns


def test_the_larger_of_two_errors_by_hand() -> None:
    values = torch.tensor([0.2, 0.8, -1.0, 1.8], dtype=torch.float64, requires_grad=True)  # from 0, and towards 1
    zeros, ones = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    loss = clipped_value_loss(values, zeros, ones, clip_range=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    # Inside the range; stopped at 0.5; worse than the clipped one at -0.5; and so again beyond the return.
    assert loss.tolist() == pytest.approx([0.32, 0.125, 2.0, 0.32], rel=1e-12)
    assert gradient.tolist() == pytest.approx([-0.8, 0.0, -2.0, 0.8], rel=1e-12)


def test_the_range_is_around_the_old_value_on_both_sides() -> None:
    values = torch.tensor([3.8, 2.2], dtype=torch.float64, requires_grad=True)
    old_values = torch.tensor([3.0, 3.0], dtype=torch.float64)
    returns = torch.tensor([4.0, 2.0], dtype=torch.float64)
    loss = clipped_value_loss(values, old_values, returns, clip_range=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert loss.tolist() == [0.125, 0.125]
    assert gradient.tolist() == [0.0, 0.0]


def test_without_a_range_it_is_half_the_squared_error() -> None:
    values, old_values, returns = numbers()
    loss = clipped_value_loss(values, old_values, returns, clip_range=None)
    assert_close(loss, 0.5 * F.mse_loss(values, returns, reduction="none"), **CLOSE)


@pytest.mark.parametrize("clip_range", [1e6, None])
def test_a_range_that_nothing_leaves_changes_neither_loss_nor_gradient(clip_range: float | None) -> None:
    values, old_values, returns = numbers()
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(clipped_value_loss(values, old_values, returns, clip_range).sum(), values)
    assert_close(gradient, (values - returns).detach(), **CLOSE)


def test_a_range_of_zero_takes_the_worse_of_the_old_and_the_new_value() -> None:
    values, old_values, returns = numbers()
    worse = torch.where((values - returns).abs() > (old_values - returns).abs(), values, old_values)
    expected = 0.5 * F.mse_loss(worse, returns, reduction="none")
    assert_close(clipped_value_loss(values, old_values, returns, clip_range=0.0), expected, **CLOSE)


def test_clipping_only_ever_raises_the_loss() -> None:
    values, old_values, returns = numbers()
    clipped = clipped_value_loss(values, old_values, returns, clip_range=0.2)
    free = clipped_value_loss(values, old_values, returns, clip_range=None)
    assert (clipped >= free).all()
    assert (clipped > free).any()


def test_a_value_within_the_range_has_the_same_loss_as_without_one() -> None:
    values, old_values, returns = numbers()
    near = old_values + 0.19 * values.tanh()
    free = clipped_value_loss(near, old_values, returns, clip_range=None)
    assert_close(clipped_value_loss(near, old_values, returns), free, **CLOSE)


def test_the_default_range_is_a_fifth() -> None:
    zeros, ones = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert clipped_value_loss(ones, zeros, ones).item() == pytest.approx(0.5 * 0.8**2, rel=1e-12)


def test_the_loss_does_not_see_a_shift_or_a_reflection() -> None:
    values, old_values, returns = numbers()
    loss = clipped_value_loss(values, old_values, returns)
    assert_close(clipped_value_loss(values + 3.0, old_values + 3.0, returns + 3.0), loss, **CLOSE)
    assert_close(clipped_value_loss(-values, -old_values, -returns), loss, **CLOSE)
