from dataclasses import replace

import pytest
import torch

from lightning_rlhf.rewards.combine import CombinedReward
from tests.networks import EOS, written


def rollouts():
    """Three responses of 2, 1 and 3 tokens."""
    batch = written([[0], [0, 1], [2, 3]], [[1, EOS], [2], [3, 4, EOS]])
    return replace(batch, prompts=["a", "a b", "c d"], responses=["b", "c", "d e"])


def scored(rewards):
    return CombinedReward(rewards)(rollouts(), "the tokenizer")


def short(prompts, responses):
    return [-1.0, -2.0, -3.0]


def sometimes(prompts, responses):
    return [None, 10.0, 20.0]


def seldom(prompts, responses):
    return [None, None, 5.0]


def dense(prompts, responses):
    return [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]


def test_a_single_reward_is_its_own_sum():
    scores = scored(short)
    assert scores.total.tolist() == [-1.0, -2.0, -3.0]
    assert scores.total.dtype == torch.float32
    assert {name: values.tolist() for name, values in scores.by_name.items()} == {"short": [-1.0, -2.0, -3.0]}
    assert scores.token_scores is None


def test_rewards_are_weighed_and_added_up_and_kept_unweighted_by_name():
    scores = scored([short, (sometimes, 0.5), [seldom, 2]])
    assert scores.total.tolist() == [-1.0, -2.0 + 5.0, -3.0 + 10.0 + 10.0]
    assert scores.by_name["short"].tolist() == [-1.0, -2.0, -3.0]
    assert scores.by_name["sometimes"].tolist()[1:] == [10.0, 20.0]


def test_where_a_reward_does_not_apply_it_adds_nothing_and_has_no_score():
    applies = {name: (~values.isnan()).tolist() for name, values in scored([short, sometimes, seldom]).by_name.items()}
    assert applies == {"short": [True] * 3, "sometimes": [False, True, True], "seldom": [False, False, True]}


@pytest.mark.invariant(39)
def test_a_response_to_which_no_reward_applies_is_an_error_that_names_it():
    complaint = r"^`reward` 'sometimes, seldom' gave None for response 0 \('b'\), and no other reward applies"
    with pytest.raises(ValueError, match=complaint):
        scored([sometimes, seldom])
    with pytest.raises(ValueError, match=r"'seldom' gave None for response 0 \('b'\)"):
        scored(seldom)


@pytest.mark.invariant(19)
def test_dense_scores_lie_on_their_own_tokens_and_others_on_the_last():
    scores = scored([dense, (short, 10.0)])
    expected = [[1.0, 2.0 - 10.0, 0.0], [3.0 - 20.0, 0.0, 0.0], [4.0, 5.0, 6.0 - 30.0]]
    assert scores.token_scores.tolist() == expected
    assert scores.total.tolist() == [sum(row) for row in expected]
    assert scores.by_name["dense"].tolist() == [3.0, 3.0, 15.0]
    assert scores.by_name["short"].tolist() == [-1.0, -2.0, -3.0]


@pytest.mark.invariant(19)
def test_the_weight_of_dense_scores_counts_for_every_token():
    scores = scored([(dense, -0.5), sometimes])
    assert scores.token_scores.tolist() == [[-0.5, -1.0, 0.0], [-1.5 + 10.0, 0.0, 0.0], [-2.0, -2.5, -3.0 + 20.0]]
    assert scores.total.tolist() == [-1.5, 8.5, 12.5]


def test_two_rewards_of_one_name_are_told_apart():
    scores = scored([short, short, (short, 3.0)])
    assert list(scores.by_name) == ["short", "short_2", "short_3"]
    assert scores.total.tolist() == [-5.0, -10.0, -15.0]


def test_a_number_at_the_end_of_a_name_that_is_taken_is_passed_over():
    def second(prompts, responses):
        return [0.0, 0.0, 0.0]

    second.__name__ = "short_2"
    assert list(scored([short, second, short]).by_name) == ["short", "short_2", "short_3"]


@pytest.mark.parametrize("name", ["mean", "std", "total"])
def test_a_reward_does_not_take_the_name_that_the_sum_is_logged_under(name):
    def reward(prompts, responses):
        return [0.0, 0.0, 0.0]

    reward.__name__ = name
    assert CombinedReward(reward).name == f"{name}_2"


def test_rewards_may_be_dotted_names_with_weights_as_in_yaml():
    scores = scored(["tests.rewards.test_combine.short", ["tests.rewards.test_combine.sometimes", 0.1]])
    assert list(scores.by_name) == ["short", "sometimes"]
    assert scores.total.tolist() == pytest.approx([-1.0, -1.0, -1.0], abs=1e-6)


def test_a_single_dotted_name_is_one_reward():
    assert scored("tests.rewards.test_combine.short").total.tolist() == [-1.0, -2.0, -3.0]


def test_every_reward_is_called_once_with_all_responses():
    calls = []

    def counting(prompts, responses):
        calls.append(list(responses))
        return [0.0] * len(responses)

    scored([counting, short])
    assert calls == [["b", "c", "d e"]]


def test_scores_are_in_single_precision_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        scores = scored([dense, short])
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [scores.total, scores.token_scores, *scores.by_name.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_weight_of_zero_still_logs_its_reward():
    scores = scored([short, (dense, 0.0)])
    assert scores.total.tolist() == [-1.0, -2.0, -3.0]
    assert scores.by_name["dense"].tolist() == [3.0, 3.0, 15.0]


@pytest.mark.parametrize(
    ("rewards", "error", "complaint"),
    [
        ([], ValueError, r"`reward=\[\]` names no reward"),
        (None, TypeError, "`reward=None` must be callable"),
        (0.5, TypeError, "`reward=0.5` must be callable"),
        ([short, 0.5], TypeError, "`reward=0.5` must be callable"),
        ({"short": short}, TypeError, "`reward={'short': .*}` must be callable"),
        (
            "tests.rewards.test_combine.long",
            ValueError,
            "`reward='tests.rewards.test_combine.long'` must be a callable",
        ),
        ("math.pi", TypeError, "`reward=3.14.*` must be callable"),
    ],
)
def test_what_is_no_reward_is_an_error_that_quotes_it(rewards, error, complaint):
    with pytest.raises(error, match=complaint):
        CombinedReward(rewards)
