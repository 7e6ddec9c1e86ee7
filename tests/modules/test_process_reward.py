"""Process reward models: what they learn, beside plain torch; what is measured; their exports as dense rewards."""

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification

from lightning_rlhf import (
    ModelSpec,
    PPOModule,
    PreferenceDataModule,
    ProcessRewardModule,
    RewardEnsemble,
    RewardModel,
    StepDataModule,
)
from lightning_rlhf.models.reference import fingerprint
from tests.modules.test_reward import PAIRS, Watch, ids_of, scored_by, sgd
from tests.networks import ARCHITECTURES, ENCODERS, word_tokenizer
from tests.training import bare_trainer, weights
from tests.training import fit as fit_policy
from tests.training import module_of as policy_of

ROWS = [
    {"prompt": "a b", "steps": ["c d", "e"], "labels": [True, False]},
    {"prompt": "c", "response": "d v f v g h", "labels": [1, None, 0]},
    {"prompt": "a b", "completions": ["k"], "labels": [0.25]},
    {"prompt": "t s r q", "response": "a v b b b b v ", "labels": [1.0, 0.0]},
    {"prompt": "e", "steps": ["f g h i", "j", "k"], "labels": [None, 1, 1]},
]
STEPS = [["c d", "e"], ["d", "f", "g h"], ["k"], ["a", "b b b b"], ["f g h i", "j", "k"]]
WINDOW = 3


def module_of(model=None, **arguments):
    defaults = {"tokenizer": word_tokenizer(), "optimizer": sgd, "seed": 0, "separator": " v "}
    return ProcessRewardModule(scored_by() if model is None else model, **{**defaults, **arguments})


class Losses(Watch):
    def on_train_batch_end(self, trainer, module, *args):
        if "step/loss" in trainer.callback_metrics and len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["step/loss"]))


def fit(module, batch_size=WINDOW, shuffle=False, ckpt_path=None, **flags):
    watch = Losses()
    data = StepDataModule(ROWS, batch_size=batch_size, shuffle=shuffle, seed=0)
    callbacks = [*flags.pop("callbacks", []), watch]
    bare_trainer(**{"max_epochs": 2, "callbacks": callbacks, **flags}).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return watch.losses


def plain_scores(model, prompt, steps):
    """The score of every step, each read at the end of a text that ends with it and the separator."""
    scores, ids = [], ids_of(prompt)
    for step in steps:
        ids = [*ids, *ids_of(step), *ids_of("v")]
        tokens = torch.tensor([ids])
        scores.append(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, 0])
    return scores


def plain_terms(model, number, loss):
    """The loss of every step with a label."""
    terms = []
    scores = plain_scores(model, ROWS[number]["prompt"], STEPS[number])
    for score, label in zip(scores, ROWS[number]["labels"], strict=True):
        if label is None:
            continue
        probability, label = 1 / (1 + (-score).exp()), float(label)
        likely = label * probability.log() + (1 - label) * (1 - probability).log()
        terms.append(-likely if loss == "bce" else (score - label) ** 2)
    return terms


def by_hand(loss):
    """Plain torch on whole windows, one step after the other and nothing padded."""
    model = scored_by()
    optimizer, losses = sgd(model.parameters()), []
    for numbers in [(0, 1, 2), (3, 4)] * 2:
        terms = [term for number in numbers for term in plain_terms(model, number, loss)]
        mean = sum(terms) / len(terms)
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        losses.append(float(mean.detach()))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), losses


@pytest.mark.invariant(30)
@pytest.mark.parametrize(("loss", "batch_size", "accumulate"), [("bce", 3, 1), ("mse", 3, 1), ("bce", 1, 3)])
def test_it_learns_what_plain_torch_learns_however_batches_are_split(loss, batch_size, accumulate):
    expected, losses = by_hand(loss)
    module = module_of(loss=loss)
    found = fit(module, batch_size=batch_size, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=2e-6)
    assert found == pytest.approx(losses, abs=2e-6)


@pytest.mark.invariant(36)
@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, step):
    def run(ckpt_path=None):
        keep = ModelCheckpoint(
            tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
        )
        module = module_of(disable_dropout=False, lr_scheduler="cosine", warmup_updates=2)
        flags = {"callbacks": [keep], "enable_checkpointing": True}
        return module, fit(module, batch_size=2, shuffle=True, ckpt_path=ckpt_path, **flags)

    whole, losses = run()
    assert len(losses) == 6
    resumed, rest = run(tmp_path / f"step={step}.ckpt")
    assert rest == losses[step:]
    assert fingerprint(resumed.policy) == fingerprint(whole.policy)


@pytest.mark.invariant(6, 8)
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "in_line"), [("gpt2", False), ("gpt2", True), ("llama", False), ("llama", True), ("mamba", False)]
)
def test_a_step_is_scored_as_if_it_were_the_last_thing_written(name, in_line):
    model = scored_by(ARCHITECTURES[name]() if name != "gpt2" else None)
    module = module_of(copy.deepcopy(model), loss="mse")
    module.configure_model()
    scorer = module.policy.decoder
    assert scorer.unpads == (name != "mamba")
    scorer.pads = not in_line  # in line, whether it pays or not
    found = module.score([row["prompt"] for row in ROWS], [" v ".join(steps) for steps in STEPS], batch_size=4)
    for row, steps, scores in zip(ROWS, STEPS, found, strict=True):
        assert scores == pytest.approx([float(score) for score in plain_scores(model, row["prompt"], steps)], abs=1e-5)
    listed = module.score([row["prompt"] for row in ROWS], STEPS)
    assert [score for row in listed for score in row] == pytest.approx([s for row in found for s in row], abs=1e-5)
    assert module.score(["a", "b"], ["", " v c"]) == [[], module.score(["b"], [" v c"])[0]]


def test_positions_may_say_where_steps_end():
    rows = [{"prompt": "a", "response": "b c d e", "ends": [1, 5], "labels": [1, 0]}]
    data = StepDataModule(rows, shuffle=False)
    data.tokenizer, data.separator = word_tokenizer(), None
    (batch,) = data.train_dataloader()
    assert batch.response_tokens.tolist() == [ids_of("b c d")]
    assert batch.step_mask.tolist() == [[True, False, True]]
    assert batch.labels.tolist() == [[1.0, 0.0, 0.0]]


def test_it_learns_which_steps_are_right():
    """A step is right if its first letter is early in the alphabet."""
    letters = "abcdefghijklmnop"
    rows = [
        {"prompt": p, "steps": [a, b], "labels": [a < "i", b < "i"]} for p in "tu" for a in letters for b in letters
    ]
    module = module_of(ModelSpec(scored_by()), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
    data = StepDataModule(rows[::2], test=rows[1::2], batch_size=32, seed=0)
    trainer = bare_trainer(max_epochs=4)
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    assert found["test/step/accuracy"] > 0.9
    assert module.score(["t"], ["a v o"])[0] == pytest.approx([1.0, 0.0], abs=0.3)


# --- what is measured -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.invariant(40)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_evaluation_by_hand(batch_size):
    model = scored_by()
    data = StepDataModule(validation=ROWS, batch_size=batch_size)
    (found,) = bare_trainer().validate(module_of(copy.deepcopy(model)), datamodule=data, verbose=False)
    terms, right, probabilities = [], [], []
    for number, row in enumerate(ROWS):
        terms += plain_terms(model, number, "bce")
        for score, label in zip(plain_scores(model, row["prompt"], STEPS[number]), row["labels"], strict=True):
            if label is not None:
                probabilities.append(1 / (1 + math.exp(-score)))
            if label in (0, 1):
                right.append((score > 0) == bool(label))
    assert found["val/step/loss"] == pytest.approx(float(sum(terms)) / len(terms), abs=1e-5)
    assert found["val/step/accuracy"] == pytest.approx(sum(map(float, right)) / len(right))
    assert found["val/reward/mean"] == pytest.approx(sum(probabilities) / len(probabilities), abs=1e-5)
    assert 0.0 < found["val/step/calibration_error"] < 1.0


def test_predictions_are_scores_of_labelled_steps():
    module = module_of()
    rows = [{**row, "id": i} for i, row in enumerate(ROWS)]
    data = StepDataModule(predict=rows, batch_size=2)
    predicted = [row for part in bare_trainer().predict(module, datamodule=data) for row in part]
    assert [(row["id"], row["row"]) for row in predicted] == [(i, i) for i in range(5)]
    scores = module.score([row["prompt"] for row in ROWS], STEPS)
    for row, alone, labels in zip(predicted, scores, [row["labels"] for row in ROWS], strict=True):
        expected = [score for score, label in zip(alone, labels, strict=True) if label is not None]
        assert row["scores"] == pytest.approx(expected, abs=1e-6)


# --- its export -------------------------------------------------------------------------------------------------------


def exported(folder, loss="bce", model=None, **arguments):
    module = module_of(model, loss=loss, **arguments)
    module.save_pretrained(folder)
    return module


@pytest.mark.invariant(18, 19)
@pytest.mark.parametrize(("loss", "name"), [("bce", "gpt2"), ("mse", "gpt2"), ("bce", "mamba")])
def test_an_export_is_a_dense_reward(tmp_path, loss, name):
    module = exported(tmp_path, loss, scored_by(ARCHITECTURES[name]()))
    responses = ["c d v e", "f", "v g v", "h v v i"]
    prompts = ["a b", "c", "d", "e"]
    tokens = [torch.tensor(ids_of(response)) for response in responses]
    found = RewardModel(tmp_path)(prompts, responses, tokens, word_tokenizer())
    scores = module.score(prompts, responses)
    # "v" alone is no separator, which has space on both sides; a step's score lies on its last word.
    places = [[1, 3], [0], [2], [0, 3]]
    for row, of_steps, at, response in zip(found, scores, places, responses, strict=True):
        expected = [0.0] * len(response.split())
        for place, score in zip(at, of_steps, strict=True):
            expected[place] = score
        assert row == pytest.approx(expected, abs=1e-5)
    if loss == "bce":
        assert all(0.0 < score < 1.0 for row in scores for score in row)
        raw = RewardModel(tmp_path, output="logit")(prompts, responses, tokens, word_tokenizer())
        assert 1 / (1 + math.exp(-raw[1][0])) == pytest.approx(found[1][0], abs=1e-5)


@torch.no_grad()
@pytest.mark.invariant(18)
def test_transformers_reads_the_score_of_the_last_step(tmp_path):
    module = exported(tmp_path, "mse")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected = [float(score) for score in plain_scores(loaded, "a b", ["c d", "e"])]
    assert module.score(["a b"], ["c d v e"])[0] == pytest.approx(expected, abs=1e-5)


def test_a_policy_learns_from_it_alone_and_in_an_ensemble(tmp_path):
    folders = [str(tmp_path / f"judge{seed}") for seed in range(2)]
    for seed, folder in enumerate(folders):
        exported(folder, "bce", scored_by(seed=seed))
    alone = [policy_of(PPOModule, reward=folder, kl_coef=0.0, seed=3) for folder in folders]
    ensemble = policy_of(PPOModule, reward=RewardEnsemble(folders, "min"), kl_coef=0.0, seed=3)
    first, second, both = (fit_policy(module, iterations=1).experiences[0].scores for module in (*alone, ensemble))
    assert (first.token_scores != 0).any(1).all()
    torch.testing.assert_close(both.token_scores, torch.minimum(first.token_scores, second.token_scores))
    assert list(both.by_name) == ["judge0", "judge1", "ensemble"]


def test_a_split_of_ones_own_replaces_the_separator(tmp_path):
    exported(tmp_path / "positions", separator=None)
    prompts, responses = ["a"], ["b c d"]
    tokens = [torch.tensor(ids_of("b c d"))]
    with pytest.raises(ValueError, match="`split=None` must be given to the reward model 'positions'"):
        RewardModel(tmp_path / "positions")(prompts, responses, tokens, word_tokenizer())
    reward = RewardModel(tmp_path / "positions", split="tests.modules.test_process_reward.words")
    (scores,) = reward(prompts, responses, tokens, word_tokenizer())
    assert all(0.0 < score < 1.0 for score in scores)
    assert reward.plain()["init_args"]["split"] == "tests.modules.test_process_reward.words"
    assert RewardModel(tmp_path / "positions", split=lambda text: []).plain() is None


def words(text):
    spans, start = [], 0
    for word in text.split(" "):
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return spans


def test_steps_that_a_long_text_lost_score_nothing(tmp_path):
    exported(tmp_path, "mse")
    reward = RewardModel(tmp_path, max_tokens=4)
    response = "c d v e v f"
    with pytest.warns(UserWarning, match="1 of 1 texts have more than the 4 tokens"):
        (scores,) = reward(["a"], [response], [torch.tensor(ids_of(response))], word_tokenizer())
    assert scores[1] == 0.0
    assert scores[3] != 0.0
    assert scores[5] != 0.0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "complaint"),
    [
        (lambda: module_of(loss="ce"), ValueError, "`loss='ce'` must be 'bce' or 'mse'"),
        (lambda: module_of(separator=""), ValueError, "`separator=''` stands nowhere"),
        (lambda: module_of(evaluation_sampling={}), TypeError, "`evaluation_sampling` is no argument of ProcessReward"),
        (
            lambda: module_of(ENCODERS["bert"]()).configure_model(),
            ValueError,
            "`model=Bert.*` cannot score single steps",
        ),
        (
            lambda: fit_on(PreferenceDataModule(PAIRS)),
            TypeError,
            "PreferenceBatch, and ProcessRewardModule learns from",
        ),
        (lambda: fit_on(one(labels=[2.0])), ValueError, r"`labels` of a step are 2.0, and with `loss='bce'` they say"),
        (lambda: fit_on(one(labels=[1, 0])), ValueError, r"`steps\[0\]`: `labels` are 2, and the response has 1 steps"),
        (
            lambda: fit_on(one(ends=[1])),
            ValueError,
            r"`steps\[0\]`: `ends` say where .* `separator=' v '`: set it to N",
        ),
        (
            lambda: fit_on(one(), separator=None),
            ValueError,
            r"`steps\[0\]`: with the module's `separator=None` a row ne",
        ),
        (
            lambda: fit_on(one(ends=[9]), separator=None),
            ValueError,
            r"`ends=\[9\]` must rise from more than 0 to at mos",
        ),
        (
            lambda: fit_on(one(response=None, steps=["b v c"])),
            ValueError,
            "the step 'b v c' holds the module's `separat",
        ),
        (
            lambda: fit_on(one(response="b " * 70)),
            ValueError,
            r"`steps\[0\]` has 7\d tokens, and the model has room for",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, error, complaint):
    with pytest.raises(error, match=complaint):
        build()


def one(**more):
    row = {"prompt": "a", "response": "b", "labels": [1.0], **more}
    return StepDataModule([row])


def fit_on(data, **arguments):
    bare_trainer(max_epochs=1).fit(module_of(**arguments), datamodule=data)


def test_an_export_refuses_other_ways_to_read_it(tmp_path):
    exported(tmp_path / "judge")
    for arguments in ({"reads": "both"}, {"append_eos": True}):
        with pytest.raises(ValueError, match="the reward model 'judge' scores steps, and its export says how they are"):
            RewardModel(tmp_path / "judge", **arguments).load()
    with pytest.raises(ValueError, match="`response_tokens` and `tokenizer` must be given to the reward model 'judge'"):
        RewardModel(tmp_path / "judge")(["a"], ["b"])
    with pytest.raises(ValueError, match="`merge_adapter=False`: an adapter on a policy's model scores no steps"):
        module_of().save_pretrained(tmp_path, merge_adapter=False)
    model = scored_by()
    with pytest.raises(ValueError, match="`split=.*lines.*`: the reward model .* scores whole responses: leave it out"):
        RewardModel(model, tokenizer=word_tokenizer(), split="lines").load()
