"""Rewards and advantages: by hand, against sums over all pairs of steps, and in limits."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.functional.advantages import gae, group_relative, shaped_rewards, token_rewards

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
NAN = float("nan")
# Lengths 4, 1, 3; holes in the middle and at the start; the last token before the last column; nothing.
MASK = torch.tensor(
    [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
).bool()


def steps() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and values that are NaN where no step is, and values of the states after the last step."""
    rewards, values = torch.randn(2, *MASK.shape, dtype=torch.float64)
    final_values = torch.tensor([0.7, 0.0, -1.3, 0.4, 2.0, 0.9], dtype=torch.float64)
    return torch.where(MASK, rewards, NAN), torch.where(MASK, values, NAN), final_values


def by_pairs(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float, final_values: Tensor
) -> Tensor:
    """Every step sums what all later ones were better than expected by, in Python."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(mask)):
        columns = mask[row].nonzero()[:, 0].tolist()
        state_values = [*values[row, columns].tolist(), final_values[row].item()]
        for i in range(len(columns)):
            for j in range(i, len(columns)):
                better = rewards[row, columns[j]].item() + gamma * state_values[j + 1] - state_values[j]
                advantages[row, columns[i]] += (gamma * gae_lambda) ** (j - i) * better
    return advantages


@pytest.mark.invariant(19)
def test_the_score_lies_on_the_last_response_token_for_every_length_in_a_batch() -> None:
    scores = torch.tensor([1.0, -2.0, 3.0, 4.0])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    expected = [[1.0, 0.0, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 4.0]]
    assert token_rewards(scores, None, mask).tolist() == expected


@pytest.mark.invariant(19)
def test_the_score_lies_on_the_last_token_that_the_policy_chose_if_others_were_forced() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 0, 0, 1]]).bool()
    expected = [[0.0, 0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 6.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 7.0]]
    assert token_rewards(torch.tensor([5.0, 6.0, 7.0]), None, mask).tolist() == expected


@pytest.mark.invariant(19)
def test_dense_scores_lie_on_their_own_tokens_and_the_sum_is_not_read() -> None:
    token_scores = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN], [4.0, NAN, 5.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, True]])
    rewards = token_rewards(torch.full((3,), NAN), token_scores, mask)
    assert rewards.tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [4.0, 0.0, 5.0]]


@pytest.mark.invariant(19)
def test_more_padding_moves_no_reward() -> None:
    scores, none = torch.randn(6), torch.zeros(6, 3, dtype=torch.bool)
    rewards = token_rewards(scores, None, torch.cat([none, MASK, none], dim=1))
    assert torch.equal(rewards[:, 3:8], token_rewards(scores, None, MASK))
    assert rewards.count_nonzero() == 5


@pytest.mark.invariant(19)
def test_every_token_is_charged_for_its_own_log_ratio_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 3.0], [1.0, NAN, NAN]])
    kl = torch.tensor([[1.0, -2.0, 0.5], [4.0, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert shaped_rewards(rewards, kl, mask, 0.5).tolist() == [[-0.5, 1.0, 2.75], [-1.0, 0.0, 0.0]]
    assert shaped_rewards(rewards, kl, mask, 0.0).tolist() == [[0.0, 0.0, 3.0], [1.0, 0.0, 0.0]]


@pytest.mark.invariant(19)
def test_the_rewards_of_a_response_add_up_to_its_score_less_the_price_of_its_log_ratio() -> None:
    scores, kl = torch.randn(6, dtype=torch.float64), torch.randn(MASK.shape, dtype=torch.float64)
    rewards = shaped_rewards(token_rewards(scores, None, MASK), torch.where(MASK, kl, NAN), MASK, 0.3)
    for row in range(5):
        expected = scores[row].item() - 0.3 * sum(kl[row, MASK[row]].tolist())
        assert rewards[row].sum().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.invariant(31)
def test_a_fully_masked_response_has_no_rewards_advantages_or_returns() -> None:
    nothing = torch.full((2, 3), NAN)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    score = torch.tensor([3.0, NAN])
    zeros = torch.zeros(2, 3)
    assert torch.equal(token_rewards(score, None, mask), zeros)
    assert torch.equal(token_rewards(score, nothing, mask), zeros)
    assert torch.equal(shaped_rewards(nothing, nothing, mask, 0.1), zeros)
    for part in (*gae(nothing, nothing, mask), *gae(nothing, nothing, mask, final_values=torch.ones(2))):
        assert torch.equal(part, zeros)


@pytest.mark.invariant(23)
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (0.5, 1.0), (1.0, 0.0), (0.0, 0.7)])
def test_gae_is_the_sum_over_all_pairs_of_steps(gamma: float, gae_lambda: float, bootstrap: bool) -> None:
    rewards, values, final_values = steps()
    advantages, returns = gae(rewards, values, MASK, gamma, gae_lambda, final_values if bootstrap else None)
    end = final_values if bootstrap else torch.zeros_like(final_values)
    expected = by_pairs(rewards, values, MASK, gamma, gae_lambda, end)
    assert_close(advantages, expected, **CLOSE)
    assert_close(returns, torch.where(MASK, expected + values, 0.0), **CLOSE)


@pytest.mark.invariant(23)
def test_gae_by_hand_with_its_defaults() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.2, 0.4, 0.8]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool))
    # The steps are 0.2, 0.4 and 0.2 better than expected, and the next one counts 0.95.
    assert advantages[0].tolist() == pytest.approx([0.2 + 0.95 * (0.4 + 0.95 * 0.2), 0.59, 0.2], rel=1e-12)
    assert returns[0].tolist() == pytest.approx([0.9605, 0.99, 1.0], rel=1e-12)


@pytest.mark.invariant(23)
def test_after_a_terminal_nothing_is_expected_whatever_the_padding_holds() -> None:
    rewards = torch.tensor([[0.0, 1.0, 50.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.5, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    for final_values in (None, torch.zeros(1, dtype=torch.float64)):
        advantages, returns = gae(rewards, values, mask, 0.5, 0.0, final_values)
        assert advantages.tolist() == [[0.5 * 0.5 - 0.5, 1.0 - 0.5, 0.0]]
        assert returns.tolist() == [[0.25, 1.0, 0.0]]


@pytest.mark.invariant(23)
def test_a_response_that_was_cut_off_goes_on_with_its_final_value() -> None:
    rewards = torch.tensor([[0.0, 1.0, NAN], [0.0, 1.0, NAN]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.5, NAN], [0.5, 0.5, NAN]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, 0.5, 1.0, torch.tensor([4.0, 0.0], dtype=torch.float64))
    assert returns.tolist() == [[0.5 * (1.0 + 0.5 * 4.0), 1.0 + 0.5 * 4.0, 0.0], [0.5, 1.0, 0.0]]
    assert advantages.tolist() == [[1.0, 2.5, 0.0], [0.0, 0.5, 0.0]]


@pytest.mark.invariant(23)
def test_a_masked_column_anywhere_is_skipped() -> None:
    rewards, values = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    final_values = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64)
    expected = gae(rewards, values, mask, 0.9, 0.8, final_values)
    for place in range(5):
        kept = [column for column in range(5) if column != place]
        wide = [torch.full((3, 5), NAN, dtype=torch.float64) for _ in range(2)]
        wide_mask = torch.zeros(3, 5, dtype=torch.bool)
        wide[0][:, kept], wide[1][:, kept], wide_mask[:, kept] = rewards, values, mask
        for part, wanted in zip(gae(*wide, wide_mask, 0.9, 0.8, final_values), expected, strict=True):
            assert_close(part[:, kept], wanted, **CLOSE)
            assert torch.equal(part[:, place], torch.zeros(3, dtype=torch.float64))


def test_with_lambda_1_returns_are_the_discounted_rewards_to_come_and_values_a_mere_baseline() -> None:
    rewards, values, _ = steps()
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, gae_lambda=1.0)
    for row in range(6):
        ahead = 0.0
        for column in reversed(MASK[row].nonzero()[:, 0].tolist()):
            ahead = rewards[row, column].item() + 0.5 * ahead
            assert returns[row, column].item() == pytest.approx(ahead, rel=1e-12)
            assert advantages[row, column].item() == pytest.approx(ahead - values[row, column].item(), rel=1e-12)


def test_with_lambda_0_only_the_next_value_is_looked_at() -> None:
    rewards, values, _ = steps()
    rewards[0, 3] = 1e9  # the last of four
    advantages, _ = gae(rewards, values, MASK, gamma=0.5, gae_lambda=0.0)
    expected = rewards[0, :3] + 0.5 * values[0, 1:4] - values[0, :3]
    assert_close(advantages[0, :3], expected, **CLOSE)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_values_that_expected_exactly_what_came_leave_no_advantage(gae_lambda: float) -> None:
    rewards, _, final_values = steps()
    values = torch.full_like(rewards, NAN)
    for row in range(6):
        ahead = final_values[row]
        for column in reversed(MASK[row].nonzero()[:, 0].tolist()):
            ahead = values[row, column] = rewards[row, column] + 0.9 * ahead
    advantages, returns = gae(rewards, values, MASK, 0.9, gae_lambda, final_values)
    assert_close(advantages, torch.zeros_like(advantages), **CLOSE)
    assert_close(returns, torch.where(MASK, values, 0.0), **CLOSE)


def test_without_discount_a_shift_of_all_values_shifts_returns_alone() -> None:
    rewards, values, final_values = steps()
    advantages, returns = gae(rewards, values, MASK, 1.0, 0.7, final_values)
    shifted_advantages, shifted_returns = gae(rewards, values + 5.0, MASK, 1.0, 0.7, final_values + 5.0)
    assert_close(shifted_advantages, advantages, **CLOSE)
    assert_close(shifted_returns, returns + 5.0 * MASK, **CLOSE)


def test_every_row_is_on_its_own() -> None:
    rewards, values, final_values = steps()
    whole = gae(rewards, values, MASK, 0.9, 0.8, final_values)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    permuted = gae(rewards[order], values[order], MASK[order], 0.9, 0.8, final_values[order])
    for part, expected in zip(permuted, whole, strict=True):
        assert torch.equal(part, expected[order])


def test_no_argument_is_written_to() -> None:
    rewards, values, final_values = steps()
    before = [x.clone() for x in (rewards, values, final_values)]
    token_rewards(final_values, rewards, MASK)
    shaped_rewards(rewards, values, MASK, 0.1)
    gae(rewards, values, MASK, 0.9, 0.8, final_values)
    for after, expected in zip((rewards, values, final_values), before, strict=True):
        assert torch.equal(after.nan_to_num(-7.0), expected.nan_to_num(-7.0))


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(25)
def test_a_response_is_credited_with_how_much_better_it_scored_than_its_group_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, -1.0, -1.0, 2.0], dtype=torch.float64)
    centred = [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]
    assert group_relative(scores, 3, divide_by_std=False).tolist() == centred
    # Sums of squares 14 and 6, over 3 - 1.
    stds = [7.0**0.5] * 3 + [3.0**0.5] * 3
    expected = torch.tensor([a / s for a, s in zip(centred, stds, strict=True)], dtype=torch.float64)
    assert_close(group_relative(scores, 3, eps=0.0), expected, **CLOSE)
    assert_close(group_relative(scores, 3), expected, rtol=1e-4, atol=0.0)


@pytest.mark.invariant(25)
@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_the_advantages_of_a_group_sum_to_zero(group_size: int, divide_by_std: bool) -> None:
    scores = torch.randn(5 * group_size, dtype=torch.float64) * 3 + 7
    sums = group_relative(scores, group_size, divide_by_std).unflatten(0, (5, group_size)).sum(1)
    assert_close(sums, torch.zeros(5, dtype=torch.float64), rtol=0.0, atol=1e-12)


@pytest.mark.invariant(25)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_a_group_of_equal_scores_gives_exactly_zero(divide_by_std: bool, eps: float) -> None:
    for score in (0.0, 0.1, 1 / 3, -7.7, 1e30):
        for group_size in (2, 3, 7, 64):
            scores = torch.cat([torch.full((group_size,), score), torch.arange(group_size).float()])
            advantages = group_relative(scores, group_size, divide_by_std, eps)
            assert advantages[:group_size].tolist() == [0.0] * group_size
            assert bool(advantages[group_size:].isfinite().all())
            assert bool((advantages[group_size:] != 0).any())


@pytest.mark.invariant(25)
def test_a_group_does_not_see_another_one_nor_what_is_added_to_all_of_its_scores() -> None:
    scores = torch.randn(12, dtype=torch.float64)
    whole = group_relative(scores, 4)
    assert torch.equal(torch.cat([group_relative(part, 4) for part in scores.split(4)]), whole)
    assert_close(group_relative(scores + 5.0, 4), whole, rtol=1e-9, atol=1e-9)
    assert_close(group_relative(100.0 * scores, 4, eps=0.0), group_relative(scores, 4, eps=0.0), **CLOSE)


def test_differences_that_are_rounding_are_not_blown_up() -> None:
    scores = torch.tensor([1.0, 1.0 + 2e-7, 1.0, 1.0 - 1e-7])
    assert float(group_relative(scores, 4).abs().max()) < 3e-3


@pytest.mark.parametrize(("scores", "group_size"), [(5, 2), (3, 4), (4, 0)])
def test_scores_that_make_no_whole_groups_are_refused(scores: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=f"`group_size={group_size}` does not divide {scores} scores"):
        group_relative(torch.zeros(scores), group_size)
