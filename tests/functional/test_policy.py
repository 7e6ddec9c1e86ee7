"""Policy-gradient objectives: every branch by hand, in value and gradient, and limits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.functional.policy import ClipRange, clip_bounds, clipped_surrogate, outside_clip

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def loss_and_gradient(
    ratio: list[float], advantage: float, clip_range: ClipRange = 0.2, dual_clip: float | None = None
) -> tuple[list[float], list[float]]:
    ratios = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(ratios, torch.full_like(ratios, advantage), clip_range, dual_clip)
    (gradient,) = torch.autograd.grad(loss.sum(), ratios)
    return loss.tolist(), gradient.tolist()


def grid() -> tuple[Tensor, Tensor]:
    ratio = torch.linspace(0.03, 4.97, 60, dtype=torch.float64)
    return torch.meshgrid(ratio, torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64), indexing="ij")


@pytest.mark.invariant(29)
def test_a_good_token_is_pushed_up_until_its_ratio_leaves_the_range_above() -> None:
    loss, gradient = loss_and_gradient([0.5, 1.0, 1.5], 2.0)
    assert loss == pytest.approx([-1.0, -2.0, -2.4], rel=1e-12)
    assert gradient == [-2.0, -2.0, 0.0]


@pytest.mark.invariant(29)
def test_a_bad_token_is_pushed_down_until_its_ratio_leaves_the_range_below() -> None:
    loss, gradient = loss_and_gradient([0.5, 1.0, 1.5], -2.0)
    assert loss == pytest.approx([1.6, 2.0, 3.0], rel=1e-12)
    assert gradient == [0.0, 2.0, 2.0]


@pytest.mark.invariant(29)
def test_two_numbers_clip_asymmetrically() -> None:
    loss, gradient = loss_and_gradient([0.5, 0.95, 1.5, 2.0], 2.0, (0.1, 0.6))
    assert loss == pytest.approx([-1.0, -1.9, -3.0, -3.2], rel=1e-12)
    assert gradient == [-2.0, -2.0, -2.0, 0.0]
    loss, gradient = loss_and_gradient([0.5, 0.95, 1.5, 2.0], -2.0, (0.1, 0.6))
    assert loss == pytest.approx([1.8, 1.9, 3.0, 4.0], rel=1e-12)
    assert gradient == [0.0, 2.0, 2.0, 2.0]


@pytest.mark.invariant(29)
def test_a_dual_clip_bounds_the_loss_of_bad_tokens() -> None:
    loss, gradient = loss_and_gradient([0.5, 1.0, 2.75, 3.5, 9.0], -2.0, dual_clip=3.0)
    assert loss == pytest.approx([1.6, 2.0, 5.5, 6.0, 6.0], rel=1e-12)
    assert gradient == [0.0, 2.0, 2.0, 0.0, 0.0]


@pytest.mark.invariant(29)
def test_a_dual_clip_leaves_good_tokens_alone() -> None:
    loss, gradient = loss_and_gradient([0.5, 1.0, 2.75, 9.0], 2.0, dual_clip=3.0)
    assert loss == pytest.approx([-1.0, -2.0, -2.4, -2.4], rel=1e-12)
    assert gradient == [-2.0, -2.0, 0.0, 0.0]


@pytest.mark.invariant(29)
def test_the_default_range_is_that_of_the_paper() -> None:
    ratio, advantages = grid()
    assert torch.equal(clipped_surrogate(ratio, advantages), clipped_surrogate(ratio, advantages, 0.2, None))


def test_the_range_is_the_same_both_ways_if_one_number_is_given() -> None:
    ratio, advantages = grid()
    assert torch.equal(clipped_surrogate(ratio, advantages, 0.3), clipped_surrogate(ratio, advantages, (0.3, 0.3)))
    assert torch.equal(outside_clip(ratio, 0.3), outside_clip(ratio, (0.3, 0.3)))


def test_a_range_of_zero_keeps_nothing_beyond_the_sampled_policy() -> None:
    loss, gradient = loss_and_gradient([0.5, 1.5], 2.0, 0.0)
    assert (loss, gradient) == ([-1.0, -2.0], [-2.0, 0.0])
    loss, gradient = loss_and_gradient([0.5, 1.5], -2.0, 0.0)
    assert (loss, gradient) == ([2.0, 3.0], [0.0, 2.0])


def test_an_unbounded_range_is_importance_sampling() -> None:
    ratio, advantages = grid()
    infinite = float("inf")
    for clip_range in (infinite, (infinite, infinite)):
        assert torch.equal(clipped_surrogate(ratio, advantages, clip_range), -ratio * advantages)
        assert outside_clip(ratio, clip_range).sum() == 0.0
    assert torch.equal(clipped_surrogate(ratio, advantages, 0.2, infinite), clipped_surrogate(ratio, advantages, 0.2))


@pytest.mark.parametrize("clip_range", [0.0, 0.2, (0.2, 0.28)])
def test_at_the_policy_that_sampled_it_is_the_policy_gradient(clip_range: ClipRange) -> None:
    logprobs = torch.tensor([-0.1, -3.0, -7.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    loss = clipped_surrogate((logprobs - logprobs.detach()).exp(), advantages, clip_range, dual_clip=3.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert_close(gradient, -advantages, **CLOSE)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_loss_is_never_below_the_unclipped_one_unless_the_dual_clip_bounds_it(dual_clip: float | None) -> None:
    ratio, advantages = grid()
    loss = clipped_surrogate(ratio, advantages, (0.2, 0.4), dual_clip)
    bounded = (advantages < 0) & (ratio > 3.0) if dual_clip else torch.zeros_like(ratio, dtype=torch.bool)
    assert (loss >= -ratio * advantages)[~bounded].all()
    assert torch.equal(loss[bounded], (-3.0 * advantages)[bounded])


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_loss_scales_with_the_advantage(dual_clip: float | None) -> None:
    ratio, advantages = grid()
    loss = clipped_surrogate(ratio, advantages, (0.2, 0.4), dual_clip)
    assert torch.equal(clipped_surrogate(ratio, 4.0 * advantages, (0.2, 0.4), dual_clip), 4.0 * loss)
    assert torch.equal(loss[advantages == 0], torch.zeros(60, dtype=torch.float64))


def test_no_gradient_flows_through_the_advantages() -> None:
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    ratio, advantages = grid()
    loss = clipped_surrogate(ratio * weight, advantages * weight, dual_clip=3.0).sum()
    fixed = clipped_surrogate(ratio * weight, advantages * 2.0, dual_clip=3.0).sum()
    assert torch.autograd.grad(loss, weight) == torch.autograd.grad(fixed, weight)


def test_neither_argument_is_written_to() -> None:
    ratio, advantages = grid()
    before = ratio.clone(), advantages.clone()
    clipped_surrogate(ratio, advantages, (0.1, 0.2), 3.0)
    assert torch.equal(ratio, before[0])
    assert torch.equal(advantages, before[1])


def test_ratios_outside_the_range_are_counted_and_its_ends_are_inside() -> None:
    ratio = torch.tensor([0.5, 0.74, 0.75, 1.0, 1.25, 1.26, 1.5])
    assert outside_clip(ratio, 0.25).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert outside_clip(ratio, (0.25, 0.5)).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert outside_clip(ratio, (0.5, 0.25)).tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert outside_clip(ratio.double(), 0.25).dtype == torch.float64


@pytest.mark.parametrize("clip_range", [0.2, (0.1, 0.6)])
def test_outside_the_range_the_better_sign_has_no_gradient_and_inside_both_have(clip_range: ClipRange) -> None:
    ratio = torch.linspace(0.03, 4.97, 60, dtype=torch.float64, requires_grad=True)
    stopped = torch.zeros(60, dtype=torch.float64)
    for sign in (1.0, -1.0):
        loss = clipped_surrogate(ratio, torch.full_like(ratio, sign), clip_range)
        stopped += torch.autograd.grad(loss.sum(), ratio)[0] == 0.0
    assert torch.equal(outside_clip(ratio.detach(), clip_range), stopped)


@pytest.mark.parametrize("clip_range", [(-0.1, 0.2), [0.1], [0.1, 0.2, 0.3], float("nan"), -1.0])
def test_a_clip_range_is_one_number_or_two(clip_range: Any) -> None:
    with pytest.raises(ValueError, match="`clip_range=.*` must be a number of at least 0, or two"):
        clip_bounds(clip_range)


def test_a_list_of_two_is_a_clip_range() -> None:
    assert clip_bounds([0.1, 0.3]) == (0.1, 0.3) == clip_bounds((0.1, 0.3))
