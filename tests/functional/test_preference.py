"""Objectives on comparisons: by hand, against plain loops, and at their limits."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional.preference import (
    bradley_terry,
    ordered_pairs,
    plackett_luce,
    rao_kupper_tie,
    squared_sum,
)

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def everywhere(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


@pytest.mark.invariant(33)
def test_a_pair_with_a_margin_by_hand() -> None:
    # Odds of 3, of 1/3, and of 3 that a margin makes 1 and a ninth.
    differences = numbers(math.log(3), -math.log(3), math.log(3), math.log(3))
    margins = numbers(0.0, 0.0, math.log(3), 3 * math.log(3))
    loss = bradley_terry(differences, margins)
    assert loss.exp().tolist() == pytest.approx([4 / 3, 4.0, 2.0, 10.0], rel=1e-12)


@pytest.mark.invariant(33)
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_label_smoothing_is_the_mean_of_both_ways_round(margin: float) -> None:
    differences = torch.randn(20, dtype=torch.float64)
    ways = [[1 / (1 + math.exp(margin - d)), 1 / (1 + math.exp(margin + d))] for d in differences.tolist()]
    expected = [-0.9 * math.log(win) - 0.1 * math.log(lose) for win, lose in ways]
    assert bradley_terry(differences, margin, label_smoothing=0.1).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_large_difference_neither_overflows_nor_loses_its_gradient() -> None:
    differences = numbers(1e4, -1e4).requires_grad_()
    loss = bradley_terry(differences)
    (gradient,) = torch.autograd.grad(loss.sum(), differences)
    assert loss.tolist() == [0.0, 1e4]
    assert gradient.tolist() == [0.0, -1.0]


@pytest.mark.invariant(33)
@pytest.mark.parametrize("difference", [-3.0, -0.2, 0.0, 1.5])
@pytest.mark.parametrize("threshold", [0.01, 0.5, 4.0])
def test_win_loss_and_tie_are_all_that_can_happen(difference: float, threshold: float) -> None:
    d = numbers(difference)
    chances = [bradley_terry(d, threshold), bradley_terry(-d, threshold), rao_kupper_tie(d, threshold)]
    assert sum(float((-chance).exp()) for chance in chances) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.invariant(33)
def test_a_tie_by_hand() -> None:
    # Strengths 6 and 2 under a threshold of 3: 6/(6 + 3 * 2) to win, 2/(2 + 3 * 6) to lose, and a tie else.
    loss = rao_kupper_tie(numbers(math.log(6 / 2)), math.log(3))
    assert float((-loss).exp()) == pytest.approx(1 - 1 / 2 - 1 / 10, rel=1e-12)
    equal = rao_kupper_tie(numbers(0.0), 0.8)
    assert float((-equal).exp()) == pytest.approx(math.tanh(0.4), rel=1e-12)


def test_a_tie_is_likeliest_between_equals() -> None:
    differences = numbers(-2.0, 0.0, 2.0).requires_grad_()
    (gradient,) = torch.autograd.grad(rao_kupper_tie(differences, 0.7).sum(), differences)
    assert gradient[1] == 0.0
    assert gradient[0] == -gradient[2] < 0.0


@pytest.mark.invariant(33)
def test_a_ranking_by_hand() -> None:
    # Strengths 2, 3, 1, ranked in this order: 2/6, then 3/4, then what is left.
    scores = numbers(2.0, 3.0, 1.0).log()[None]
    loss = plackett_luce(scores, torch.tensor([[0, 1, 2]]), everywhere(scores))
    assert float((-loss).exp()) == pytest.approx(2 / 6 * 3 / 4, rel=1e-12)
    loss = plackett_luce(scores, torch.tensor([[1, 0, 2]]), everywhere(scores))
    assert float((-loss).exp()) == pytest.approx(3 / 6 * 2 / 3, rel=1e-12)


@pytest.mark.invariant(33)
def test_the_probabilities_of_all_rankings_add_up_to_one() -> None:
    scores = torch.randn(1, 4, dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(4)):
        total += float((-plackett_luce(scores, torch.tensor([order]), everywhere(scores))).exp())
    assert total == pytest.approx(1.0, rel=1e-12)


@pytest.mark.invariant(33)
def test_a_ranking_of_two_is_a_pair() -> None:
    scores = torch.randn(50, 2, dtype=torch.float64)
    ranks = torch.tensor([[0, 1]]).expand(50, 2)
    assert_close(plackett_luce(scores, ranks, everywhere(scores)), bradley_terry(scores[:, 0] - scores[:, 1]), **CLOSE)


@pytest.mark.invariant(33)
def test_equal_ranks_are_each_drawn_from_what_is_no_better() -> None:
    # Strengths 2, 3, 1; the first alone, and the others tied: 2/6, and then 3/4 and 1/4.
    scores = numbers(2.0, 3.0, 1.0).log()[None]
    loss = plackett_luce(scores, torch.tensor([[0, 1, 1]]), everywhere(scores))
    assert float((-loss).exp()) == pytest.approx(2 / 6 * 3 / 4 * 1 / 4, rel=1e-12)


@pytest.mark.invariant(33)
def test_rankings_against_plain_loops_with_ties_and_responses_that_are_not_there() -> None:
    torch.manual_seed(0)
    scores = torch.randn(200, 5, dtype=torch.float64)
    ranks, mask = torch.randint(0, 4, (200, 5)), torch.rand(200, 5) < 0.7
    expected = []
    for row, places, there in zip(scores.tolist(), ranks.tolist(), mask.tolist(), strict=True):
        present = [i for i in range(5) if there[i]]
        expected.append(
            -sum(row[i] - math.log(sum(math.exp(row[j]) for j in present if places[j] >= places[i])) for i in present)
        )
    assert plackett_luce(scores, ranks, mask).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.invariant(8)
def test_what_is_not_there_changes_no_ranking_and_has_no_gradient() -> None:
    scores = torch.tensor([[0.3, -1.0, torch.inf], [2.0, 0.5, -3.0]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss = plackett_luce(scores, torch.tensor([[0, 1, 2], [0, 1, 2]]), mask)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert loss[0].item() == pytest.approx(math.log(1 + math.exp(-1.3)), rel=1e-12)
    assert gradient[0, 2] == 0.0
    assert torch.isfinite(gradient).all()


def test_centring_is_the_square_of_the_sum() -> None:
    scores = torch.tensor([[1.0, 2.0, 100.0], [1.0, -1.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert squared_sum(scores, mask).tolist() == [9.0, 9.0]


def test_pairs_are_all_those_of_which_one_is_better() -> None:
    scores = torch.tensor([[5.0, 3.0, 2.0], [7.0, 4.0, 9.0], [1.0, 1.0, 0.0], [8.0, 6.0, 2.0]])
    ranks = torch.tensor([[0, 1, 2], [0, 1, 9], [0, 0, 1], [0, 1, 2]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True], [False, True, True]])
    differences, rows = ordered_pairs(scores, ranks, mask)
    found = sorted(zip(rows.tolist(), differences.tolist(), strict=True))
    assert found == [(0, 1.0), (0, 2.0), (0, 3.0), (1, 3.0), (2, 1.0), (2, 1.0), (3, 4.0)]
