"""Ensembles: by hand and beside NumPy; each member and all together in what is logged; stored."""

import math

import numpy as np
import pytest
import torch

from lightning_rlhf import DenseReward, PPOModule, PromptDataModule, RegexMatch, RewardEnsemble, RewardModel
from lightning_rlhf.functional.ensemble import ensemble_score
from lightning_rlhf.modules.arguments import plain_arguments
from lightning_rlhf.rewards.combine import CombinedReward
from tests.networks import network, tiny_gpt2, word_tokenizer, written
from tests.training import bare_trainer, fit, module_of


def low(prompts, responses):
    return [1.0, 4.0, None][: len(responses)]


def high(prompts, responses):
    return [3.0, 2.0, None][: len(responses)]


def other(prompts, responses):
    return [0.5, None, 7.0][: len(responses)]


def rollouts(count=2):
    batch = written([[0]] * count, [[1, 2], [2], [3]][:count])
    batch.responses = ["b c", "c", "d"][:count]
    return batch


@pytest.mark.parametrize(
    ("combine", "coef", "expected"),
    [
        ("mean", None, [2.0, 3.0]),
        ("min", None, [1.0, 2.0]),
        ("mean-std", 0.5, [1.5, 2.5]),
        ("mean-variance", 2.0, [0.0, 1.0]),
    ],
)
def test_two_members_by_hand_alone_and_together(combine, coef, expected):
    ensemble = RewardEnsemble([low, high], combine, coef)
    scores = CombinedReward([(ensemble, 10.0), (RegexMatch("c"), 1.0)])(rollouts(), None)
    assert list(scores.by_name) == ["low", "high", "regex", "ensemble"]
    assert scores.by_name["ensemble"].tolist() == pytest.approx(expected)
    assert scores.by_name["low"].tolist() == [1.0, 4.0]
    assert scores.total.tolist() == pytest.approx([10 * expected[0] + 1.0, 10 * expected[1] + 1.0])
    assert scores.token_scores is None


@pytest.mark.parametrize("combine", ["mean", "min", "mean-std", "mean-variance"])
def test_whoever_has_nothing_to_say_does_not_count(combine):
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(4, 30))
    scores[generator.random(scores.shape) < 0.5] = np.nan
    scores[:, 0] = np.nan
    found = ensemble_score(torch.tensor(scores), combine, 0.3)
    assert math.isnan(found[0])
    for column, value in zip(scores.T[1:], found[1:].tolist(), strict=True):
        some = column[~np.isnan(column)]
        if not len(some):
            assert math.isnan(value)
            continue
        taken_off = {"mean-std": 0.3 * some.std(), "mean-variance": 0.3 * some.var()}.get(combine, 0.0)
        assert value == pytest.approx((some.min() if combine == "min" else some.mean()) - taken_off)


def test_where_no_member_applies_another_reward_must():
    ensemble = RewardEnsemble([low, high], name="panel")
    scores = CombinedReward([ensemble, other])(rollouts(3), None)
    assert scores.total.tolist() == pytest.approx([2.5, 3.0, 7.0])
    assert scores.by_name["panel"].isnan().tolist() == [False, False, True]
    with pytest.raises(ValueError, match="`reward` 'panel' gave None for response 2"):
        CombinedReward([ensemble])(rollouts(3), None)


def early(prompts, segments):
    return [[1.0] * len(row) for row in segments]


def words(text):
    return [(i, i + 1) for i, letter in enumerate(text) if letter != " "]


def test_dense_members_are_combined_token_by_token():
    def tokens(prompts, responses):
        return [[3.0, -2.0], [0.5]]

    dense = DenseReward(early, split=words)
    scores = CombinedReward(RewardEnsemble([tokens, dense], "min"))(rollouts(), word_tokenizer())
    assert scores.token_scores.tolist() == [[1.0, -2.0], [0.5, 0.0]]
    assert scores.total.tolist() == [-1.0, 0.5]
    mixed = CombinedReward(RewardEnsemble([low, dense]))
    with pytest.raises(
        ValueError, match=r"ensemble 'ensemble' scored per token \('early'\) and per response \('low'\)"
    ):
        mixed(rollouts(), word_tokenizer())


def test_names_are_unique_and_members_are_not_normalised():
    ensembles = [RewardEnsemble([low, high]), RewardEnsemble([low, other])]
    combined = CombinedReward(ensembles)
    assert combined.names == ["low", "high", "low_2", "other", "ensemble", "ensemble_2"]
    assert combined.weight_by_name == {"ensemble": 1.0, "ensemble_2": 1.0}
    module = module_of(PPOModule, reward=[RewardEnsemble([RegexMatch("a"), RegexMatch("b")])], normalize_rewards=True)
    assert list(module.scaled.moments_by_name) == ["ensemble"]
    seen = fit(module, iterations=1)
    assert {"reward/regex", "reward/regex_2", "reward/ensemble"} <= seen.metrics[0].keys()
    (validated,) = bare_trainer().validate(module, datamodule=data_of(["a", "b"]), verbose=False)
    mean = (validated["val/reward/regex"] + validated["val/reward/regex_2"]) / 2
    assert validated["val/reward/ensemble"] == pytest.approx(mean)


def data_of(prompts):
    return PromptDataModule(validation=prompts, batch_size=2)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Two classifiers with one output."""
    from transformers import AutoModelForSequenceClassification

    folders = []
    for seed in range(2):
        folders.append(tmp_path_factory.mktemp(f"judge{seed}"))
        torch.manual_seed(seed)
        config = tiny_gpt2(initializer_range=0.3, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folders[-1])
        word_tokenizer().save_pretrained(folders[-1])
    return folders


def test_reward_models_are_members_and_a_checkpoint_knows_them(judges):
    members = [str(judges[0]), RewardModel(judges[1], name="second"), "tests.rewards.test_ensemble.constant"]
    module = module_of(PPOModule, reward=[(RewardEnsemble(members, "mean-std", 0.5), 2.0)])
    assert len(module.reward.models) == 2
    (experience,) = fit(module, iterations=1).experiences
    texts = (experience.prompts, experience.responses)
    rows = zip(experience.response_tokens, experience.response_mask, strict=True)
    written_as = ([tokens[mask] for tokens, mask in rows], word_tokenizer())
    alone = torch.tensor([*(RewardModel(judge)(*texts, *written_as) for judge in judges), constant(*texts)])
    expected = 2.0 * (alone.mean(0) - 0.5 * alone.std(0, correction=0))
    torch.testing.assert_close(experience.scores.total, expected, rtol=0, atol=1e-5)
    stored = plain_arguments({"reward": [(RewardEnsemble(members, "mean-std", 0.5), 2.0)]})["reward"]
    loaded = CombinedReward(stored)
    assert loaded.names == module.reward.names
    ensemble, _ = loaded.ensembles["ensemble"]
    assert (ensemble.combine, ensemble.coef, loaded.weights) == ("mean-std", 0.5, [2.0])


def constant(prompts, responses):
    return [0.25] * len(responses)


@pytest.mark.parametrize(
    ("build", "error", "complaint"),
    [
        (lambda: RewardEnsemble([low]), ValueError, r"`rewards=\[.*\]` must be a list of two rewards or more"),
        (lambda: RewardEnsemble("runs/judge"), ValueError, "`rewards='runs/judge'` must be a list"),
        (
            lambda: RewardEnsemble([low, high], "max"),
            ValueError,
            "`combine='max'` must be one of 'mean', 'min', 'mean-s",
        ),
        (lambda: RewardEnsemble([low, high], "mean-std"), ValueError, "`coef=None` must be more than 0 and finite"),
        (lambda: RewardEnsemble([low, high], "mean-std", -1.0), ValueError, "`coef=-1.0` must be more than 0"),
        (lambda: RewardEnsemble([low, high], "min", 0.5), ValueError, "`coef=0.5` is read by nothing with `combine='m"),
        (
            lambda: RewardEnsemble([RewardEnsemble([low, high]), low]),
            TypeError,
            "holds the ensemble 'ensemble': name its",
        ),
    ],
)
def test_what_makes_no_ensemble_is_refused(build, error, complaint):
    with pytest.raises(error, match=complaint):
        build()


def test_one_whose_members_cannot_be_imported_is_not_stored():
    assert RewardEnsemble([lambda prompts, responses: [], low]).plain() is None
    assert RewardEnsemble([low, RewardModel(network(tiny_gpt2()), tokenizer=word_tokenizer())]).plain() is None
