from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_rlhf.batches import Scores
from lightning_rlhf.modules.scaling import ScoreScaler
from tests.networks import written

LENGTHS = (2, 1, 3)


def rollouts(truncated=(False, False, False)):
    batch = written([[0]] * 3, [[1] * length for length in LENGTHS])
    return replace(batch, truncated=torch.tensor(truncated))


def scaled(scaler, total, **more):
    return scaler(Scores(total=torch.tensor(total, dtype=torch.float32)), rollouts(**more)).total.tolist()


def dense(scaler, rows, **more):
    scores = Scores(total=torch.tensor([sum(row) for row in rows]), token_scores=torch.tensor(rows))
    return scaler(scores, rollouts(**more))


def stream(iterations=5, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(loc=3.0, scale=2.0, size=3).tolist() for _ in range(iterations)]


def test_nothing_is_done_unless_asked_for():
    assert scaled(ScoreScaler(), [-100.0, 0.5, 100.0]) == [-100.0, 0.5, 100.0]


def test_scores_are_clipped_on_both_sides():
    assert scaled(ScoreScaler(clip=2.0), [-3.0, 0.5, 2.5]) == [-2.0, 0.5, 2.0]


@pytest.mark.invariant(27)
def test_the_running_scale_is_the_deviation_of_all_clipped_scores_so_far_these_included():
    scaler = ScoreScaler(clip=4.0, scaling="running")
    so_far = []
    for scores in stream():
        clipped = np.clip(scores, -4.0, 4.0)
        so_far += clipped.tolist()
        assert scaled(scaler, scores) == pytest.approx((clipped / np.std(so_far, ddof=1)).tolist(), rel=1e-6)
    assert max(so_far) == 4.0


@pytest.mark.invariant(27)
def test_the_first_scale_is_the_deviation_of_the_first_iteration():
    scaler = ScoreScaler(scaling="first")
    first, *_ = scores = stream()
    for row in scores:
        assert scaled(scaler, row) == pytest.approx((np.array(row) / np.std(first, ddof=1)).tolist(), rel=1e-6)


@pytest.mark.invariant(27)
@pytest.mark.parametrize("scaling", ["running", "first"])
def test_all_ranks_count(monkeypatch, scaling):
    # The other process holds 7, 8 and 9: 24 is their sum, and 194 that of their squares.
    other = torch.tensor([3.0, 24.0, 194.0], dtype=torch.float64)
    monkeypatch.setattr("lightning_rlhf.modules.scaling.sum_over_ranks", lambda moments: moments + other)
    expected = np.array([1.0, 2.0, 4.0]) / np.std([1, 2, 4, 7, 8, 9], ddof=1)
    assert scaled(ScoreScaler(scaling=scaling), [1.0, 2.0, 4.0]) == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_mean_is_never_taken_off():
    assert scaled(ScoreScaler(scaling="running"), [10.0, 11.0, 12.0]) == [10.0, 11.0, 12.0]


@pytest.mark.parametrize("score", [0.0, 0.1, -7.3, 1e-6])
@pytest.mark.parametrize("repeats", [1, 400])
def test_equal_scores_stay_as_they_are(score, repeats):
    scaler = ScoreScaler(scaling="running")
    for _ in range(repeats):
        result = scaled(scaler, [score] * 3)
    assert result == pytest.approx([score] * 3, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_scores_does_not_matter(scale):
    rows = stream()
    one, other = ScoreScaler(scaling="running"), ScoreScaler(scaling="running")
    for row in rows:
        assert scaled(one, [scale * x for x in row]) == pytest.approx(scaled(other, row), rel=1e-5)


def test_a_single_score_has_no_scale():
    scaler = ScoreScaler(scaling="running")
    one = rollouts().select(torch.tensor([0]))
    assert scaler(Scores(total=torch.tensor([5.0])), one).total.tolist() == [5.0]


def test_the_penalty_for_being_cut_off_comes_before_the_clip():
    scaler = ScoreScaler(clip=2.0, missing_eos_penalty=3.0)
    assert scaled(scaler, [1.0, 5.0, 4.5], truncated=(True, False, True)) == [-2.0, 2.0, 1.5]


@pytest.mark.invariant(19)
def test_the_penalty_lies_on_the_last_token_of_dense_scores():
    rows = [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [4.0, 5.0, 6.0]]
    scores = dense(ScoreScaler(missing_eos_penalty=1.5), rows, truncated=(True, False, True))
    assert scores.token_scores.tolist() == [[1.0, 0.5, 0.0], [3.0, 0.0, 0.0], [4.0, 5.0, 4.5]]
    assert scores.total.tolist() == [1.5, 3.0, 13.5]


def test_dense_scores_are_clipped_one_by_one_and_scaled_by_the_deviation_of_their_sums():
    rows = [[1.0, -5.0, 0.0], [3.0, 0.0, 0.0], [4.0, 1.0, 1.0]]
    scores = dense(ScoreScaler(clip=2.0, scaling="running"), rows)
    clipped = np.array([[1.0, -2.0, 0.0], [2.0, 0.0, 0.0], [2.0, 1.0, 1.0]])
    expected = clipped / np.std([-1.0, 2.0, 4.0], ddof=1)
    np.testing.assert_allclose(scores.token_scores.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(scores.total.numpy(), expected.sum(1), rtol=1e-6)


def test_what_each_reward_gave_is_kept_and_the_scores_given_are_not_changed():
    given = Scores(total=torch.tensor([1.0, 20.0, 3.0]), by_name={"cats": torch.tensor([1.0, 20.0, 3.0])})
    result = ScoreScaler(clip=2.0, scaling="first")(given, rollouts())
    assert result.by_name["cats"].tolist() == [1.0, 20.0, 3.0]
    assert given.total.tolist() == [1.0, 20.0, 3.0]


@pytest.mark.invariant(36)
@pytest.mark.parametrize("scaling", ["running", "first"])
def test_it_goes_on_from_a_saved_state(scaling):
    whole, before, after = (ScoreScaler(clip=4.0, scaling=scaling) for _ in range(3))
    scores = stream()
    expected = [scaled(whole, row) for row in scores]
    for row in scores[:2]:
        scaled(before, row)
    after.load_state_dict(before.state_dict())
    assert [scaled(after, row) for row in scores[2:]] == expected[2:]


def test_a_state_holds_plain_numbers():
    scaler = ScoreScaler(scaling="running")
    scaled(scaler, [1.0, 2.0, 3.0])
    assert scaler.state_dict() == {"moments": [3.0, 6.0, 14.0], "by_name": {}}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"clip": 0.0}, "`reward_clip=0.0` must be positive, or None"),
        ({"clip": -1.0}, "`reward_clip=-1.0` must be positive"),
        ({"clip": float("nan")}, "`reward_clip=nan` must be positive"),
        ({"scaling": "always"}, "`reward_scaling='always'` must be 'running', 'first' or None"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        ScoreScaler(**arguments)


# --- rewards one by one -----------------------------------------------------------------------------------------------

WEIGHTS = {"helpful": 2.0, "short": -0.5}


def both(helpful, short, tokens=None):
    """Scores as the rewards give them; of `short` the tokens too, where it is dense."""
    by_name = {"helpful": torch.tensor(helpful), "short": torch.tensor(short)}
    total = sum(weight * by_name[name].nan_to_num(0.0) for name, weight in WEIGHTS.items())
    more = (
        {} if tokens is None else {"token_scores": torch.zeros(3, 3), "tokens_by_name": {"short": torch.tensor(tokens)}}
    )
    return Scores(total=total, by_name=by_name, **more)


def normalized(so_far, row):
    """What numpy says that scores are once normalised, those where the reward did not apply as 0."""
    seen = np.concatenate(so_far)
    seen = seen[~np.isnan(seen)]
    return np.nan_to_num((np.array(row) - seen.mean()) / np.std(seen, ddof=1))


@pytest.mark.invariant(27)
def test_each_reward_is_normalised_by_the_moments_of_its_own_stream():
    scaler = ScoreScaler(weights=WEIGHTS, normalize=["helpful", "short"])
    streams = stream(seed=1), [[100.0 * x + 1e4 for x in row] for row in stream(seed=2)]
    streams[1][1][2] = float("nan")
    for i, (helpful, short) in enumerate(zip(*streams, strict=True)):
        expected = 2.0 * normalized(streams[0][: i + 1], helpful) - 0.5 * normalized(streams[1][: i + 1], short)
        result = scaler(both(helpful, short), rollouts())
        np.testing.assert_allclose(result.total.numpy(), expected, atol=2e-5)
        assert result.token_scores is None
        assert result.by_name["helpful"].tolist() == pytest.approx(helpful, rel=1e-6)
    assert scaler.moments_by_name["short"][0] == 14.0


def test_a_reward_that_is_not_named_stays_as_it_is():
    row = [1.0, 2.0, 6.0]
    result = ScoreScaler(weights=WEIGHTS, normalize=["short"])(both([1.0, 2.0, 4.0], row), rollouts())
    expected = 2.0 * np.array([1.0, 2.0, 4.0]) - 0.5 * normalized([row], row)
    np.testing.assert_allclose(result.total.numpy(), expected, atol=1e-6)


@pytest.mark.invariant(19, 27)
def test_dense_scores_are_divided_alike_and_the_mean_is_taken_off_on_the_last_token():
    rows = [[1.0, 3.0, 0.0], [float("nan")] * 3, [2.0, 1.0, 5.0]]  # of 2, 1 and 3 tokens; the second does not apply
    helpful, sums = [1.0, 2.0, 4.0], [4.0, float("nan"), 8.0]
    scaler = ScoreScaler(weights=WEIGHTS, normalize=["helpful", "short"])
    result = scaler(both(helpful, sums, rows), rollouts())
    mean, std = 6.0, np.std([4.0, 8.0], ddof=1)
    first = 2.0 * normalized([helpful], helpful)
    expected = [
        [-0.5 * 1.0 / std, -0.5 * (3.0 - mean) / std + first[0], 0.0],
        [first[1], 0.0, 0.0],
        [-0.5 * 2.0 / std, -0.5 * 1.0 / std, -0.5 * (5.0 - mean) / std + first[2]],
    ]
    np.testing.assert_allclose(result.token_scores.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(result.total.numpy(), np.sum(expected, axis=1), atol=1e-6)


def test_equal_scores_are_normalised_to_nothing():
    scaler = ScoreScaler(weights={"helpful": 1.0, "short": 1.0}, normalize=["helpful", "short"])
    result = scaler(both([0.1] * 3, [float("nan")] * 3), rollouts())
    assert result.total.tolist() == pytest.approx([0.0] * 3, abs=1e-7)


def test_penalty_clip_and_scale_come_after():
    row = [1.0, 2.0, 6.0]
    scaler = ScoreScaler(clip=1.0, missing_eos_penalty=0.5, weights={"helpful": 1.0}, normalize=["helpful"])
    scores = Scores(total=torch.tensor(row), by_name={"helpful": torch.tensor(row)})
    first, second, third = normalized([row], row)
    assert third > 1.0
    result = scaler(scores, rollouts(truncated=(True, False, False))).total.tolist()
    assert result == pytest.approx([max(first - 0.5, -1.0), second, 1.0], abs=1e-6)


@pytest.mark.invariant(27)
def test_all_ranks_count_for_each_reward(monkeypatch):
    # The other process holds 7, 8 and 9 of the one, and nothing of the other.
    other = torch.tensor([[3.0, 24.0, 194.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    monkeypatch.setattr("lightning_rlhf.modules.scaling.sum_over_ranks", lambda moments: moments + other)
    result = ScoreScaler(weights=WEIGHTS, normalize=["short", "helpful"])(
        both([1.0, 2.0, 4.0], [1.0, 2.0, 6.0]), rollouts()
    )
    first = (np.array([1.0, 2.0, 4.0]) - 31 / 6) / np.std([1, 2, 4, 7, 8, 9], ddof=1)
    expected = 2.0 * first - 0.5 * normalized([[1.0, 2.0, 6.0]], [1.0, 2.0, 6.0])
    np.testing.assert_allclose(result.total.numpy(), expected, atol=1e-6)


@pytest.mark.invariant(36)
def test_the_moments_of_each_reward_are_state():
    def run(scaler, rows):
        return [scaler(both(row, row[::-1]), rollouts()).total.tolist() for row in rows]

    whole, before, after = (ScoreScaler(weights=WEIGHTS, normalize=["helpful", "short"]) for _ in range(3))
    rows = stream()
    expected = run(whole, rows)
    run(before, rows[:2])
    after.load_state_dict(before.state_dict())
    assert run(after, rows[2:]) == expected[2:]


def test_a_reward_that_there_is_not_cannot_be_normalised():
    with pytest.raises(
        ValueError, match="`normalize_rewards` names 'funny', which is none of the rewards: helpful, short"
    ):
        ScoreScaler(weights=WEIGHTS, normalize=["short", "funny"])
