"""Reward models: what they learn, beside plain torch; what is measured; what is saved, and who reads it."""

import copy
import functools
import math
import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf import GRPOModule, ModelSpec, PreferenceDataModule, PromptDataModule, RewardModel, RewardModule
from lightning_rlhf.models.reference import fingerprint
from lightning_rlhf.models.scorer import Scorer
from lightning_rlhf.models.scorer_loading import load_scorer
from lightning_rlhf.modules.preference_metrics import CalibrationError
from tests.networks import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    ENCODERS,
    EOS,
    PAD,
    VOCABULARY,
    network,
    tiny_gpt2,
    word_tokenizer,
)
from tests.training import bare_trainer, weights

PAIRS = [
    {"prompt": "a b", "chosen": "c d e f g", "rejected": "h"},
    {"prompt": "c", "chosen": "d", "rejected": "e f", "margin": 0.7},
    {"prompt": "c", "chosen": "k l", "rejected": "m"},
    {"prompt": "t s r q", "chosen": "a", "rejected": "b b b b b b"},
    {"prompt": "f", "responses": ["g h", "i", "j k l", "m"], "ranks": [2, 3, 1, 4]},
    {"prompt": "n", "chosen": "o", "rejected": "p", "tie": True},
    {"prompt": "e", "responses": ["f", "g", "h i"], "scores": [0.5, 2.0, 0.5]},
]
WINDOW = 4
sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def scored_by(config=None, seed=0):
    """A classifier whose scores differ by about 1."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = load_scorer(ModelSpec(config or tiny_gpt2(**without_dropout)))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                parameter.normal_(std=0.2)
    return model


def module_of(model=None, **arguments):
    arguments = {"tokenizer": word_tokenizer(), "optimizer": sgd, "seed": 0, "tie_threshold": 0.4, **arguments}
    return RewardModule(scored_by() if model is None else model, **arguments)


class Watch(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, *args):
        if "preference/loss" in trainer.callback_metrics and len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["preference/loss"]))


def fit(module, rows=PAIRS, batch_size=WINDOW, shuffle=False, validation=None, ckpt_path=None, **flags):
    watch = Watch()
    data = PreferenceDataModule(rows, validation=validation, batch_size=batch_size, shuffle=shuffle, seed=0)
    callbacks = [*flags.pop("callbacks", []), watch]
    bare_trainer(**{"max_epochs": 2, "callbacks": callbacks, **flags}).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return watch


def batch_of(rows):
    data = PreferenceDataModule(rows, shuffle=False)
    data.tokenizer = word_tokenizer()
    (batch,) = data.train_dataloader()
    return batch


def ids_of(text):
    vocabulary = word_tokenizer().get_vocab()
    return [vocabulary[word] for word in text.split()]


def plain_score(model, prompt, response):
    """transformers' forward on one text, its end included."""
    ids = torch.tensor([ids_of(prompt) + ids_of(response) + [EOS]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]


def plain_loss(model, row, threshold=0.4, smoothing=0.0, centring=0.0):
    """The objective in the words of the papers, one comparison at a time."""
    if "responses" in row:
        signs = row.get("ranks") or [-score for score in row["scores"]]
        scores = [plain_score(model, row["prompt"], response) for response in row["responses"]]
        loss = 0.0
        for sign, weight in ((1, 1 - smoothing), (-1, smoothing)):
            for mine, place in zip(scores, signs, strict=True):
                rest = [other for other, its in zip(scores, signs, strict=True) if sign * its >= sign * place]
                loss = loss - weight * (mine - torch.stack(rest).exp().sum().log())
    else:
        scores = [plain_score(model, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        strong, weak = scores[0].exp(), scores[1].exp()
        margin, theta = math.exp(row.get("margin", 0.0)), math.exp(threshold)
        if row.get("tie"):
            loss = -((theta**2 - 1) * strong * weak / (strong + theta * weak) / (weak + theta * strong)).log()
        else:
            win, lose = strong / (strong + theta * margin * weak), weak / (weak + theta * margin * strong)
            loss = -(1 - smoothing) * win.log() - smoothing * lose.log()
    return loss + centring * sum(scores) ** 2


def by_hand(model, epochs=2, **arguments):
    """Plain torch on whole windows, one text after the other and nothing padded."""
    optimizer, losses = sgd(model.parameters()), []
    for start in [*range(0, len(PAIRS), WINDOW)] * epochs:
        rows = PAIRS[start : start + WINDOW]
        loss = sum(plain_loss(model, row, **arguments) for row in rows) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), losses


@pytest.fixture(scope="module")
def expected():
    return by_hand(scored_by())


@pytest.mark.invariant(30, 33)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_it_learns_what_plain_torch_learns_however_batches_are_split(expected, batch_size, accumulate):
    module = module_of()
    watch = fit(module, batch_size=batch_size, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(weights(module), expected[0], rtol=0, atol=2e-6)
    assert watch.losses == pytest.approx(expected[1], abs=2e-6)


@pytest.mark.invariant(33)
@pytest.mark.parametrize("name", ["bert", "t5", "mamba"])
def test_encoders_encoder_decoders_and_models_without_a_class_learn_likewise(name):
    configs = {"bert": lambda: ENCODERS["bert"](hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)}
    configs |= {"t5": lambda: ENCODER_DECODERS["t5"](dropout_rate=0.0), "mamba": ARCHITECTURES["mamba"]}
    model = scored_by(configs[name]())
    module = module_of(copy.deepcopy(model))
    watch = fit(module, max_epochs=1)
    _, losses = by_hand(model.train(), epochs=1)
    assert watch.losses == pytest.approx(losses, abs=2e-5)


@pytest.mark.invariant(33)
def test_smoothing_and_centring_are_in_the_loss():
    _, losses = by_hand(scored_by(), epochs=1, smoothing=0.1, centring=0.03)
    watch = fit(module_of(label_smoothing=0.1, center_coef=0.03), max_epochs=1)
    assert watch.losses == pytest.approx(losses, abs=2e-6)
    _, plain = by_hand(scored_by(), epochs=1)
    assert abs(losses[0] - plain[0]) > 1e-2


def test_it_learns_to_tell_good_from_bad():
    """What is early in the alphabet is better; of letters that it did not see in this place."""
    letters = "abcdefghijklmnop"
    rows = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p in "uv"
        for c in letters
        for r in letters
        if c < r and c + r != "ep"
    ]
    module = module_of(
        ModelSpec(tiny_gpt2(layers=1, width=32)), optimizer=functools.partial(torch.optim.AdamW, lr=5e-3)
    )
    watch = fit(module, rows, batch_size=32, shuffle=True, max_epochs=4)
    assert watch.losses[0] > 0.6
    scores = module.score(["u", "u", "v", "v"], ["e", "p", "b", "n"])
    assert scores[0] > scores[1] + 1
    assert scores[2] > scores[3] + 1


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(10)
@pytest.mark.parametrize(("unfrozen", "blocks"), [(0, []), (1, [1]), (2, [0, 1])])
def test_the_head_trains_and_as_many_blocks_as_are_unfrozen(unfrozen, blocks):
    module = module_of(ModelSpec(scored_by(), num_layers_unfrozen=unfrozen))
    module.configure_model()
    start = copy.deepcopy(module.policy.state_dict())
    fit(module, max_epochs=1)
    moved = {name for name, weight in module.policy.state_dict().items() if not torch.equal(weight, start[name])}
    assert "decoder.model.score.weight" in moved
    assert {int(name.split(".h.")[1][0]) for name in moved if ".h." in name} == set(blocks)
    assert not any("wte" in name or "wpe" in name for name in moved)
    assert any("ln_f" in name for name in moved) == bool(blocks)


def test_the_head_may_have_a_rate_of_its_own():
    module = module_of(learning_rates={"head": 1.0, "model": 0.0})
    fit(module, max_epochs=1)
    groups = {group["name"]: group["lr"] for group in module.optimizers().param_groups}
    assert groups == {"head": 1.0, "model": 0.0}
    own = dict(scored_by().named_parameters())
    for name, parameter in module.policy.decoder.model.named_parameters():
        assert torch.equal(parameter, own[name]) == (name != "score.weight"), name


@pytest.mark.invariant(13, 18)
def test_an_adapter_and_the_head_train_and_a_whole_model_is_saved(tmp_path):
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "init_lora_weights": False}
    start = scored_by()
    module = module_of(ModelSpec(start, adapter=adapter))
    fit(module, max_epochs=1)
    module.save_pretrained(tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    own = dict(start.named_parameters())
    moved = {name for name, weight in saved.named_parameters() if not torch.equal(weight, own[name])}
    assert moved == {"score.weight", *(f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1))}
    check_export(module, tmp_path)


def test_a_quantised_base_learns_by_its_adapter_and_head(tmp_path, caplog):
    scored_by(tiny_gpt2(width=64, resid_pdrop=0.5)).save_pretrained(tmp_path / "base")
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}
    module = module_of(ModelSpec(tmp_path / "base", quantization="nf4", adapter=adapter))
    watch = fit(module, max_epochs=3)
    assert watch.losses[-1] < watch.losses[1]
    model = module.policy.decoder.model
    assert module.policy.decoder.head == "score"
    assert model.score.weight.dtype == torch.float32
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.uint8
    with caplog.at_level("INFO"):
        module.save_pretrained(tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(merged.score.weight, model.score.weight)
    (said,) = re.findall(r"The merged model scores a few tokens (\S+) from the quantised one", caplog.text)
    assert abs(float(said)) < 1e-5  # what the model has of dropout while it is saved is no part of it
    with pytest.raises(ValueError, match="`quantization='nf4'` leaves .* nothing to train but its head"):
        module_of(ModelSpec(tmp_path / "base", quantization="nf4")).configure_model()


def test_a_network_that_is_built_anew_keeps_nothing_of_the_first():
    """As where no other process can take it."""
    module = module_of(tiny_gpt2())
    for _ in range(2):
        module._build()
        owners = {id(owner) for owner, _, _ in module._dropout}
        model = module.policy.decoder.model
        assert owners <= {id(part) for part in [*model.modules(), model.config]} != set()
        assert len(owners) > 5


# --- what is measured -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.invariant(40)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_by_hand(batch_size):
    model = scored_by()
    rows = [{**row, "book": "xy"[i % 2]} for i, row in enumerate(PAIRS[:5])]
    module = module_of(copy.deepcopy(model), tie_threshold=0.0, group_by="book")
    data = PreferenceDataModule(validation=rows, batch_size=batch_size)
    (found,) = bare_trainer().validate(module, datamodule=data, verbose=False)

    scores = [[plain_score(model, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows[:4]]
    best_first = ["j k l", "g h", "i", "m"]
    scores.append([plain_score(model, "f", response) for response in best_first])
    margins = [(i, a - b) for i, some in enumerate(scores) for k, a in enumerate(some) for b in some[k + 1 :]]
    right = [float(margin > 0) for _, margin in margins]
    everything = torch.tensor([score for some in scores for score in some])
    assert found["val/preference/loss"] == pytest.approx(
        float(sum(plain_loss(model, row, threshold=0.0) for row in rows)) / 5, abs=1e-5
    )
    assert found["val/preference/margin"] == pytest.approx(float(sum(m for _, m in margins)) / 10, abs=1e-5)
    assert found["val/preference/accuracy"] == pytest.approx(sum(right) / 10)
    for book, group in (("x", (0, 2, 4)), ("y", (1, 3))):
        own = [float(margin > 0) for i, margin in margins if i in group]
        assert found[f"val/preference/accuracy/{book}"] == pytest.approx(sum(own) / len(own))
    assert 0.0 < found["val/preference/calibration_error"] < 1.0
    assert (found["val/reward/mean"], found["val/reward/std"]) == pytest.approx(
        (float(everything.mean()), float(everything.std())), abs=1e-5
    )
    assert (module.mean, module.std) == pytest.approx((float(everything.mean()), float(everything.std())), abs=1e-5)


@torch.no_grad()
def test_confidence_in_an_answer_is_that_of_those_who_give_one():
    """Of three outcomes, a tie being the third."""
    model, rows, theta = scored_by(), PAIRS[:4], math.exp(1.5)
    module = module_of(copy.deepcopy(model), tie_threshold=1.5)
    (found,) = bare_trainer().validate(module, datamodule=PreferenceDataModule(validation=rows), verbose=False)
    error = CalibrationError()
    for row in rows:
        strong, weak = (plain_score(model, row["prompt"], row[side]).exp() for side in ("chosen", "rejected"))
        error.update((strong / (strong + theta * weak) / (weak / (weak + theta * strong))).log()[None])
    assert found["val/preference/calibration_error"] == pytest.approx(float(error.compute()), abs=1e-5)


def test_scores_are_normalised_over_what_was_validated_and_predictions_too():
    module = module_of(tie_threshold=0.4)
    fit(module, validation=PAIRS[:4], max_epochs=1, num_sanity_val_steps=0)
    texts = [(row["prompt"], row[side]) for row in PAIRS[:4] for side in ("chosen", "rejected")]
    scores = torch.tensor(module.score(*zip(*texts, strict=True), batch_size=3))
    assert (float(scores.mean()), float(scores.std())) == pytest.approx((0.0, 1.0), abs=1e-5)
    data = PreferenceDataModule(predict=[{**row, "id": i} for i, row in enumerate(PAIRS[:4])], batch_size=3)
    rows = [row for part in bare_trainer().predict(module, datamodule=data) for row in part]
    assert [(row["id"], row["row"]) for row in rows] == [(i, i) for i in range(4)]
    assert [score for row in rows for score in row["scores"]] == pytest.approx(scores.tolist(), abs=1e-5)
    as_they_are = module_of(normalize=False)
    bare_trainer().validate(as_they_are, datamodule=PreferenceDataModule(validation=PAIRS), verbose=False)
    assert (as_they_are.mean, as_they_are.std) == (0.0, 1.0)


def test_the_first_validation_set_alone_normalises():
    module = module_of()
    bare_trainer().validate(module, datamodule=PreferenceDataModule(validation=PAIRS), verbose=False)
    found = (module.mean, module.std)
    assert found != (0.0, 1.0)
    bare_trainer().test(module, datamodule=PreferenceDataModule(test=PAIRS[:2]), verbose=False)
    assert (module.mean, module.std) == found
    several = [PreferenceDataModule(validation=rows) for rows in (PAIRS, PAIRS[:2])]
    for data in several:
        data.tokenizer = module.tokenizer
    bare_trainer().validate(module, dataloaders=[data.val_dataloader() for data in several], verbose=False)
    assert (module.mean, module.std) == found


def test_scores_that_are_all_alike_keep_their_scale():
    model = scored_by()
    torch.nn.init.zeros_(model.score.weight)
    module = module_of(model)
    bare_trainer().validate(module, datamodule=PreferenceDataModule(validation=PAIRS), verbose=False)
    assert (module.mean, module.std) == (0.0, 1.0)


@pytest.mark.parametrize(("what", "rows"), [("validate", "validation"), ("test", "test")])
def test_of_an_evaluation_that_broke_off_nothing_is_counted_in_the_next(what, rows):
    class BreaksOff(Callback):
        def on_validation_batch_end(self, *args):
            raise RuntimeError("enough")

        on_test_batch_end = on_validation_batch_end

    def run(module, callbacks=()):
        data = PreferenceDataModule(**{rows: PAIRS}, batch_size=2)
        return getattr(bare_trainer(callbacks=[*callbacks]), what)(module, datamodule=data, verbose=False)

    module = module_of()
    with pytest.raises(RuntimeError, match="enough"):
        run(module, [BreaksOff()])
    assert run(module) == run(module_of())


def test_dropout_changes_no_score_in_the_middle_of_training():
    module = module_of(tiny_gpt2(resid_pdrop=0.5), disable_dropout=False)
    module.configure_model()
    assert module.policy.training
    assert module.score(["a"] * 3, ["b", "b", "b"], batch_size=1) == [module.score(["a"], ["b"])[0]] * 3
    assert module.policy.training


def test_a_row_may_be_as_long_as_the_tokenizer_says():
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 5
    with pytest.raises(ValueError, match=r"`preferences\[0\]` has 8 tokens, and the model has room for 5: "):
        fit(module_of(tokenizer=tokenizer))


def test_blocks_that_were_not_found_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr(Scorer, "find_blocks", lambda self: None)
    with pytest.raises(ValueError, match="`compile=True`: the blocks of GPT2ForSequenceClassification were not found"):
        module_of(compile=True).configure_model()


# --- what is saved ----------------------------------------------------------------------------------------------------

PROMPTS, RESPONSES = ["a b", "c", "d e f", "g"], ["c d", "e e e e", "", "h"]


@torch.no_grad()
def check_export(module, folder, raw=None):
    """The module, its export as a reward, and transformers' forward on one text at a time agree."""
    scores = module.score(PROMPTS, RESPONSES)
    assert max(scores) - min(scores) > 0.01
    assert RewardModel(folder)(PROMPTS, RESPONSES) == pytest.approx(scores, abs=2e-5)
    raw = AutoModelForSequenceClassification.from_pretrained(folder) if raw is None else raw
    alone = [
        (float(plain_score(raw, *text)) - module.mean) / module.std for text in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert alone == pytest.approx(scores, abs=2e-5)


@pytest.mark.invariant(18)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "t5", "bart"])
def test_an_export_is_a_classifier_and_a_reward(tmp_path, name):
    config = {**ARCHITECTURES, **ENCODER_DECODERS, **ENCODERS}[name]()
    module = module_of(scored_by(config))
    fit(module, max_epochs=1, validation=PAIRS)
    assert module.std != 1.0
    module.save_pretrained(tmp_path / "judge")
    check_export(module, tmp_path / "judge")


@pytest.mark.invariant(6, 18)
@torch.no_grad()
def test_transformers_reads_an_export_at_the_last_token_with_padding_on_either_side(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = tiny_gpt2(initializer_range=0.3)
    config.pad_token_id = EOS
    module = module_of(config, tokenizer=tokenizer)
    module.save_pretrained(tmp_path)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert tokenizer.pad_token_id == model.config.pad_token_id == PAD
    texts = [f"{prompt} {response} <eos>" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    for side in ("left", "right"):
        tokens = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        positions = (tokens["attention_mask"].cumsum(1) - 1).clamp(min=0)  # GPT-2 would number padding on the left
        assert model(**tokens, position_ids=positions).logits[:, 0].tolist() == pytest.approx(
            module.score(PROMPTS, RESPONSES), abs=2e-5
        )


def test_a_pad_that_the_vocabulary_lacks_is_a_new_row():
    module = module_of(tiny_gpt2(VOCABULARY - 1), tokenizer=word_tokenizer(VOCABULARY - 1, pad=False))
    module.configure_model()
    assert module.tokenizer.pad_token == "<|pad|>"
    assert module.policy.decoder.model.get_input_embeddings().weight.shape == (VOCABULARY, 16)
    assert module.policy.decoder.model.config.pad_token_id == module.tokenizer.pad_token_id == VOCABULARY - 1


@pytest.mark.invariant(18)
@pytest.mark.parametrize("name", ["mamba", "marian"])
def test_a_model_without_a_class_of_transformers_has_a_folder_of_ours(tmp_path, name):
    config = {**ARCHITECTURES, **ENCODER_DECODERS}[name]()
    module = module_of(scored_by(config))
    fit(module, max_epochs=1, validation=PAIRS)
    module.save_pretrained(tmp_path)
    check_export(module, tmp_path, module.policy.decoder.model.eval())
    again = module_of(tmp_path)  # and learns on
    again.configure_model()
    assert fingerprint(again.policy) == fingerprint(module.policy)


def test_an_export_learns_on_and_a_classifier_of_other_labels_does_not(tmp_path):
    module = module_of()
    fit(module, max_epochs=1)
    module.save_pretrained(tmp_path / "one")
    again = module_of(tmp_path / "one")
    again.configure_model()
    assert fingerprint(again.policy) == fingerprint(module.policy)
    config = tiny_gpt2()
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="`model='.*three'` is a classifier of 3 labels, and a reward model has one"):
        module_of(tmp_path / "three").configure_model()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="`model='GPT2ForSequenceClassification'` is a classifier of 3 labels"):
        module_of(classifier).configure_model()


def test_dropout_is_off_and_saved_as_it_was(tmp_path):
    module = module_of(tiny_gpt2())
    module.configure_model()
    batch = batch_of(PAIRS)
    assert torch.equal(module.policy(batch), module.policy(batch))
    module.save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.resid_pdrop == 0.1


def test_an_export_is_the_reward_of_an_online_module(tmp_path):
    module = module_of()
    fit(module, max_epochs=1, validation=PAIRS)
    module.save_pretrained(tmp_path / "judge")
    policy = GRPOModule(
        network(tiny_gpt2()),
        tokenizer=word_tokenizer(),
        reward=str(tmp_path / "judge"),
        group_size=2,
        sampling={"max_new_tokens": 4},
    )
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(policy, datamodule=PromptDataModule(["a b", "c"], batch_size=2))
    assert math.isfinite(trainer.callback_metrics["reward/judge"])


@pytest.mark.invariant(36)
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, step):
    def run(ckpt_path=None):
        keep = ModelCheckpoint(
            tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
        )
        module = module_of(scored_by(tiny_gpt2()), disable_dropout=False, lr_scheduler="cosine", warmup_updates=2)
        flags = {"callbacks": [keep], "enable_checkpointing": True, "max_epochs": 2}
        return module, fit(module, batch_size=2, shuffle=True, validation=PAIRS, ckpt_path=ckpt_path, **flags)

    whole, watch = run()
    assert len(watch.losses) == 8
    resumed, rest = run(tmp_path / f"step={step}.ckpt")
    assert rest.losses == watch.losses[step:]
    assert fingerprint(resumed.policy) == fingerprint(whole.policy)
    assert (resumed.mean, resumed.std) == (whole.mean, whole.std)
    loaded = RewardModule.load_from_checkpoint(
        tmp_path / f"step={step}.ckpt", model=scored_by(tiny_gpt2()), tokenizer=word_tokenizer()
    )
    assert (loaded.mean == 0.0) == (step <= 4)  # before the first validation


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"label_smoothing": 0.5}, "`label_smoothing=0.5` must be at least 0, and less than one half"),
        ({"tie_threshold": -1.0}, "`tie_threshold=-1.0` must be finite, and not negative"),
        ({"center_coef": math.nan}, "`center_coef=nan` must be finite, and not negative"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        module_of(**arguments)


def test_what_belongs_to_policies_is_refused():
    with pytest.raises(TypeError, match="`evaluation_sampling` is no argument of RewardModule"):
        module_of(evaluation_sampling={"temperature": 0})
    with pytest.raises(TypeError, match=r"RewardModule writes no text: `score\(prompts, responses\)`"):
        module_of().generate(["a"])
    with pytest.raises(
        TypeError, match="`smoothing=0.1` is no argument of RewardModule: did you mean `label_smoothing`"
    ):
        module_of(smoothing=0.1)


def test_ties_need_a_threshold():
    with pytest.raises(ValueError, match="`tie_threshold=0.0` says that no two responses tie, and 1 of this batch do"):
        fit(module_of(tie_threshold=0.0), max_epochs=1)


def test_a_ranking_may_have_two_best_responses_without_a_threshold():
    batch = batch_of([{"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 1, 2]}])
    scores = torch.tensor([[2.0, 3.0, 1.0]]).log()
    assert float(module_of(tie_threshold=0.0).loss(scores, batch).exp()) == pytest.approx(1 / (2 / 6 * 3 / 6 * 1))


def test_a_group_that_the_data_lacks_is_named():
    module = module_of(group_by="book")
    data = PreferenceDataModule(validation=[{**PAIRS[0], "page": 3}])
    with pytest.raises(ValueError, match=r"`group_by='book'` is no key of the data, which has \['page'\]"):
        bare_trainer().validate(module, datamodule=data, verbose=False)


def test_texts_must_be_as_many_as_prompts():
    with pytest.raises(ValueError, match=r"`prompts` \(2\) and `responses` \(1\) must be lists of one length"):
        module_of().score(["a", "b"], ["c"])


def test_a_text_that_is_too_long_to_be_scored_is_named():
    module = module_of()
    module.score(["a"], [" ".join("b" * 62)])
    with pytest.raises(ValueError, match=r"`prompts\[2\]` and `responses\[2\]` have 65 tokens together.* room for 64"):
        module.score(["a"] * 3, ["b", "c", " ".join("b" * 63)], batch_size=2)


def test_the_loss_of_a_large_difference_is_exact():
    """Where exp overflows."""
    scores = torch.tensor([[-200.0, 300.0]])
    assert float(module_of().loss(scores, batch_of(PAIRS[:1]))) == pytest.approx(500.4)


def test_folders_and_tokenizers_that_no_reward_model_comes_of_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`gguf_file='x.gguf'` holds a language model: load it once as one"):
        module_of(ModelSpec("here", gguf_file="x.gguf")).configure_model()
    with pytest.raises(
        TypeError, match="`model=3` must be a hub name, a folder, a transformers config or a PreTrained"
    ):
        module_of(3).configure_model()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`model='.*'` holds an adapter and no model: pass `ModelSpec\(<the model>"):
        module_of(tmp_path).configure_model()
    module = module_of(tokenizer=word_tokenizer(eos=False))
    with pytest.raises(ValueError, match="`tokenizer` has neither EOS nor SEP, so that no text could end: set"):
        fit(module, max_epochs=1)
