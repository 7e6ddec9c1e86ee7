from dataclasses import replace

import pytest
import torch

from lightning_rlhf.batches import Experience, Scores
from lightning_rlhf.modules.minibatches import MinibatchPlan
from tests.networks import written

LENGTH = 8
LENGTHS = (3, 1, 5, 2, 5, 4, 1)
MODES = ("tokens", "responses", "length")
SPLITS = (
    {},
    {"micro_batch_size": 1},
    {"micro_batch_size": 2},
    {"micro_batch_size": 2, "unpads": True},
    {"micro_batch_tokens": 8},
    {"micro_batch_tokens": 8, "unpads": True},
)


def experience(lengths=LENGTHS, silent=(), first=0):
    """Row i holds its number wherever a row can hold something; `silent` rows were forced, and count nothing."""
    numbers = range(first, first + len(lengths))
    rollouts = written(
        [[row] * (row % 3 + 1) for row in numbers],
        [[row] * length for row, length in zip(numbers, lengths, strict=True)],
    )
    marks = torch.tensor([float(row) for row in numbers])
    sampled = rollouts.response_mask.clone()
    sampled[list(silent)] = False
    rollouts = replace(
        rollouts,
        prompts=[f"prompt {row}" for row in numbers],
        responses=[f"response {row}" for row in numbers],
        metadata={"row": list(numbers)},
        sampled_mask=sampled,
    )
    # What does not count is large enough to be seen if it did.
    per_token = torch.where(sampled, marks[:, None] + 0.01 * torch.arange(max(lengths)), 1e6)
    scores = Scores(
        total=marks, by_name={"one": 2 * marks}, token_scores=per_token, tokens_by_name={"one": 2 * per_token}
    )
    return Experience.from_rollouts(rollouts, scores=scores, advantages=per_token)


def plan(rows, seed=0, **arguments):
    arguments = {"num_epochs": 1, "minibatch_size": 3, "micro_batch_size": None, "averaging": "tokens", **arguments}
    arguments.setdefault("rows_of_largest", len(rows))
    return MinibatchPlan(rows, length=LENGTH, generator=torch.Generator().manual_seed(seed), **arguments)


def rows_of(minibatch):
    return [row for batch in minibatch.micro_batches for row in batch.metadata["row"]]


def gradient(minibatch):
    """Of a loss whose term at token t of row i is theta[i] * (i + t / 100), as an update adds it up."""
    theta = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    for batch in minibatch.micro_batches:
        terms = theta[torch.where(batch.response_mask, batch.response_tokens, 0)] * batch.advantages
        torch.where(batch.weights != 0, batch.weights * terms, 0.0).sum().backward()
    return theta.grad


def by_hand(rows, averaging, lengths=LENGTHS, silent=()):
    """The same gradient, one term after the other."""
    loud = [row for row in rows if row not in silent]
    expected = torch.zeros(16, dtype=torch.float64)
    for row in loud:
        for t in range(lengths[row]):
            divisor = {
                "tokens": sum(lengths[other] for other in loud),
                "responses": len(loud) * lengths[row],
                "length": len(loud) * LENGTH,
            }[averaging]
            expected[row] += (row + 0.01 * t) / divisor
    return expected


@pytest.mark.invariant(30)
@pytest.mark.parametrize("averaging", MODES)
@pytest.mark.parametrize("split", [*SPLITS, {"micro_batch_size": 3}])
def test_gradients_are_the_mean_by_hand_however_a_minibatch_is_split(averaging, split):
    minibatches = list(plan(experience(), averaging=averaging, num_epochs=2, **split))
    assert [len(rows_of(minibatch)) for minibatch in minibatches] == [3, 3, 1] * 2
    for minibatch in minibatches:
        expected = by_hand(rows_of(minibatch), averaging)
        torch.testing.assert_close(gradient(minibatch), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.invariant(30)
@pytest.mark.parametrize("split", SPLITS[1:])
def test_a_split_changes_nobodys_minibatch(split):
    whole = [sorted(rows_of(minibatch)) for minibatch in plan(experience(), num_epochs=3)]
    assert [sorted(rows_of(minibatch)) for minibatch in plan(experience(), num_epochs=3, **split)] == whole


@pytest.mark.invariant(31)
@pytest.mark.parametrize("averaging", MODES)
@pytest.mark.parametrize("micro_batch_size", [1, None])
def test_a_response_without_a_token_that_counts_is_not_counted(averaging, micro_batch_size):
    silent = (2, 5)
    rows = experience(silent=silent)
    for minibatch in plan(rows, averaging=averaging, micro_batch_size=micro_batch_size):
        expected = by_hand(rows_of(minibatch), averaging, silent=silent)
        torch.testing.assert_close(gradient(minibatch), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.invariant(31)
@pytest.mark.parametrize("averaging", MODES)
def test_a_minibatch_in_which_nothing_counts_moves_nothing(averaging):
    for minibatch in plan(experience(silent=range(7)), averaging=averaging):
        assert gradient(minibatch).tolist() == [0.0] * 16


@pytest.mark.invariant(28)
def test_everything_a_row_has_stays_with_it():
    seen = []
    for minibatch in plan(experience(), micro_batch_size=2, num_epochs=2):
        for batch in minibatch.micro_batches:
            for i, row in enumerate(batch.metadata["row"]):
                seen.append(row)
                length = LENGTHS[row]
                assert batch.prompts[i] == f"prompt {row}"
                assert batch.responses[i] == f"response {row}"
                assert batch.prompt_tokens[i][batch.prompt_mask[i]].tolist() == [row] * (row % 3 + 1)
                assert batch.response_tokens[i][batch.response_mask[i]].tolist() == [row] * length
                assert float(batch.scores.total[i]) == row
                assert float(batch.scores.by_name["one"][i]) == 2 * row
                expected = [pytest.approx(row + 0.01 * t, abs=1e-5) for t in range(length)]
                assert batch.advantages[i, :length].tolist() == expected
                assert batch.scores.token_scores[i, :length].tolist() == expected
                assert torch.equal(batch.scores.tokens_by_name["one"], 2 * batch.scores.token_scores)
                assert bool((batch.weights[i, :length] > 0).all())
    assert sorted(seen) == sorted([*range(7)] * 2)


def test_every_row_is_learnt_from_once_an_epoch_in_an_order_of_its_own():
    minibatches = list(plan(experience(), num_epochs=4))
    epochs = [sum((rows_of(minibatch) for minibatch in minibatches[i : i + 3]), []) for i in range(0, 12, 3)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(7)]] * 4
    contents = [sorted(rows_of(minibatch)) for minibatch in minibatches[::3]]
    assert len({tuple(content) for content in contents}) > 1


def test_the_plan_depends_on_its_generator_alone():
    one, same, other = ([rows_of(m) for m in plan(experience(), seed=seed, num_epochs=2)] for seed in (0, 0, 1))
    assert one == same != other


def test_the_plan_knows_its_length():
    assert len(plan(experience(), num_epochs=4)) == 12
    assert len(plan(experience(), minibatch_size=7, num_epochs=2)) == 2
    assert len(plan(experience(), minibatch_size=100)) == 1


def test_rows_of_alike_length_go_together_and_are_trimmed_to_their_longest():
    (minibatch,) = plan(experience(), minibatch_size=7, micro_batch_size=2)
    lengths = [[LENGTHS[row] for row in batch.metadata["row"]] for batch in minibatch.micro_batches]
    assert lengths == [[1, 1], [2, 3], [4, 5], [5]]
    assert [batch.response_tokens.shape[1] for batch in minibatch.micro_batches] == [1, 3, 5, 5]
    for batch in minibatch.micro_batches:
        assert batch.weights.shape == batch.advantages.shape == batch.response_mask.shape
        assert batch.prompt_tokens.shape[1] == max(row % 3 + 1 for row in batch.metadata["row"])


def test_a_piece_has_as_many_tokens_as_it_may_with_or_without_their_padding():
    # Prompts and responses of 1 + 3, 2 + 1, 3 + 5, 1 + 2, 2 + 5, 3 + 4 and 1 + 1 tokens.
    (padded,) = plan(experience(), minibatch_size=7, micro_batch_tokens=8)
    (in_line,) = plan(experience(), minibatch_size=7, micro_batch_tokens=8, unpads=True)
    parts = [[sorted(batch.metadata["row"]) for batch in minibatch.micro_batches] for minibatch in (padded, in_line)]
    assert parts[0][:3] == [[1, 6], [0, 3], [5]]
    assert sorted(parts[0][3:]) == [[2], [4]]
    assert parts[1] == [[0, 1], [2], [3], [4], [5], [6]]


@pytest.mark.parametrize("averaging", MODES)
def test_padding_weighs_nothing(averaging):
    for minibatch in plan(experience(), averaging=averaging):
        for batch in minibatch.micro_batches:
            assert bool((batch.weights[~batch.response_mask] == 0).all())


def test_a_plan_can_be_gone_through_twice():
    twice = plan(experience())
    assert [gradient(minibatch).tolist() for minibatch in twice] == [
        gradient(minibatch).tolist() for minibatch in twice
    ]


def test_the_experience_is_not_changed():
    rows = experience()
    list(plan(rows))
    assert rows.weights is None
    assert rows.metadata["row"] == [*range(7)]


@pytest.fixture
def of_two_ranks(monkeypatch):
    """Both ranks' plans, made one after the other: what a rank tells the others is kept, and told at the second go."""

    def make(ranks, **arguments):
        told = []
        monkeypatch.setattr("lightning_rlhf.modules.minibatches.world_size", lambda: len(ranks))
        monkeypatch.setattr("lightning_rlhf.modules.minibatches.gather_over_ranks", lambda t: told.append(t) or t[None])
        arguments["rows_of_largest"] = max(len(rows) for rows in ranks)
        for seed, rows in enumerate(ranks):
            plan(rows, seed=seed, **arguments)
        monkeypatch.setattr("lightning_rlhf.modules.minibatches.gather_over_ranks", lambda t: torch.stack(told))
        return [plan(rows, seed=seed, **arguments) for seed, rows in enumerate(ranks)]

    return make


@pytest.mark.invariant(30, 31)
@pytest.mark.parametrize("averaging", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_mean_over_ranks_of_gradients_is_the_mean_over_the_global_minibatch(of_two_ranks, averaging, split):
    lengths = (3, 1, 5, 2, 4, 1)
    ranks = [experience(lengths[:4], silent=(1,)), experience(lengths[4:], first=4)]
    both = of_two_ranks(ranks, averaging=averaging, num_epochs=2, **split)
    assert [len(of_rank) for of_rank in both] == [4, 4]
    for one, other in zip(*both, strict=True):
        fillers = sum(float(batch.weights.abs().sum()) == 0 for batch in other.micro_batches)
        rows = rows_of(one) + rows_of(other)[: len(rows_of(other)) - fillers]
        expected = by_hand(rows, averaging, lengths, silent=(1,))
        mean = (gradient(one) + gradient(other)) / 2
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.invariant(38)
def test_every_rank_makes_as_many_updates_and_micro_batches_as_the_largest(of_two_ranks):
    large, small = of_two_ranks([experience(LENGTHS), experience((2, 3), first=7)], micro_batch_size=1)
    pieces = [[len(minibatch.micro_batches) for minibatch in of_rank] for of_rank in (large, small)]
    assert pieces == [[3, 3, 1], [3, 3, 1]]
    loud = [[bool((batch.weights != 0).any()) for batch in minibatch.micro_batches] for minibatch in small]
    assert loud == [[True, True, False], [False, False, False], [False]]
    for minibatch in small:
        assert all(len(batch) == 1 and batch.response_mask.any() for batch in minibatch.micro_batches)


@pytest.mark.invariant(38)
def test_ranks_whose_tokens_make_unlike_numbers_of_pieces_go_in_step(of_two_ranks):
    ranks = [experience(), experience((2, 3), first=7)]  # of 34 tokens and of 4 + 6
    arguments = {"minibatch_size": 7, "micro_batch_tokens": 8, "unpads": True}
    for first, second in zip(*of_two_ranks(ranks, **arguments), strict=True):
        assert [len(batch) for batch in first.micro_batches] == [2, 1, 1, 1, 1, 1]
        loud = [bool((batch.weights != 0).any()) for batch in second.micro_batches]
        assert loud == [True, True, False, False, False, False]


# --- rows without a signal --------------------------------------------------------------------------------------------


def quiet(rows, without):
    """Rows whose terms are 0, so that their gradient is; and the same, known to be so."""
    advantages = rows.advantages.clone()
    advantages[without] = torch.where(rows.sampled_mask[without], 0.0, advantages[without])
    has_signal = torch.ones(len(rows), dtype=torch.bool)
    has_signal[without] = False
    return replace(rows, advantages=advantages), replace(rows, advantages=advantages, has_signal=has_signal)


@pytest.mark.invariant(30)
@pytest.mark.parametrize("averaging", MODES)
@pytest.mark.parametrize("micro_batch_size", [1, 2, None])
def test_rows_without_a_signal_are_not_run_and_change_no_gradient(averaging, micro_batch_size):
    without = [0, 2, 3]
    arguments = {"averaging": averaging, "micro_batch_size": micro_batch_size, "num_epochs": 2}
    whole, fewer = (list(plan(rows, **arguments)) for rows in quiet(experience(), without))
    for one, other in zip(whole, fewer, strict=True):
        torch.testing.assert_close(gradient(other), gradient(one), rtol=1e-6, atol=1e-9)
        loud = sorted(row for row in rows_of(one) if row not in without)
        assert sorted(rows_of(other)) == loud
        assert gradient(other).nonzero().flatten().tolist() == loud


@pytest.mark.invariant(30)
@pytest.mark.parametrize("averaging", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_importance_stays_with_its_token_and_is_no_part_of_the_count(averaging, split):
    rows, fewer = quiet(experience(silent=(5,)), [0, 2])
    importance = torch.linspace(0.5, 2.0, rows.advantages.numel()).view_as(rows.advantages)
    weighed = replace(fewer, importance=importance)
    # As though every term, and nothing else, were so many times as large.
    expected = replace(rows, advantages=rows.advantages * importance)
    for one, other in zip(
        plan(expected, averaging=averaging), plan(weighed, averaging=averaging, **split), strict=True
    ):
        torch.testing.assert_close(gradient(other), gradient(one), rtol=1e-6, atol=1e-9)


@pytest.mark.invariant(30)
def test_a_minibatch_of_rows_without_a_signal_is_still_a_step_with_gradient_zero():
    _, rows = quiet(experience(), list(range(7)))
    minibatches = list(plan(rows, micro_batch_size=1))
    assert [len(minibatch.micro_batches) for minibatch in minibatches] == [1, 1, 1]
    for minibatch in minibatches:
        assert gradient(minibatch).tolist() == [0.0] * 16
        assert float(minibatch.micro_batches[0].weights.abs().max()) == 0.0


@pytest.mark.invariant(30, 38)
@pytest.mark.parametrize("averaging", MODES)
def test_ranks_with_different_numbers_of_rows_without_a_signal_go_in_step(of_two_ranks, averaging):
    lengths = (3, 1, 5, 2, 4, 1)
    loud = [experience(lengths[:3]), experience(lengths[3:], first=3)]
    pairs = [quiet(loud[0], [0, 1, 2]), quiet(loud[1], [1])]  # nothing is left of the first rank
    arguments = {"averaging": averaging, "micro_batch_size": 1}
    whole = of_two_ranks([pair[0] for pair in pairs], **arguments)
    fewer = of_two_ranks([pair[1] for pair in pairs], **arguments)
    for ones, others in zip(zip(*whole, strict=True), zip(*fewer, strict=True), strict=True):
        assert [len(other.micro_batches) for other in others] == [2, 2]
        mean = (gradient(ones[0]) + gradient(ones[1])) / 2
        torch.testing.assert_close((gradient(others[0]) + gradient(others[1])) / 2, mean, rtol=1e-6, atol=1e-9)
        assert not any((batch.weights != 0).any() for batch in others[0].micro_batches)
