"""Validation, test and prediction, of modules that write and of modules that imitate."""

import csv
import functools
import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler

from lightning_rlhf import ConversationDataModule, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.modules.report import Report
from tests.networks import network, tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, Seen, bare_trainer, module_of, share_of_early_letters

HELD_OUT = [{"prompt": prompt, "answer": answer} for prompt, answer in zip("abcdefg", "gfedcba", strict=True)]


def ppo(**arguments):
    return module_of(PPOModule, **arguments)


def lengths(prompts, responses, answer):
    assert [dict(zip("abcdefg", "gfedcba", strict=True))[prompt] for prompt in prompts] == answer
    words = [len(response.split()) for response in responses]
    return {"words": words, "long": [None if n < 3 else 1.0 for n in words], "batch": len(prompts)}


def validated(module, rows=HELD_OUT, batch_size=3, **flags):
    data = PromptDataModule(validation=rows, batch_size=batch_size)
    (results,) = bare_trainer(**flags).validate(module, datamodule=data, verbose=False)
    return results


def test_what_is_reported_is_the_mean_over_every_response_once():
    module = ppo(evaluation_sampling={"temperature": 0}, metric_fn=lengths)
    results = validated(module)
    responses = module.generate(list("abcdefg"), {"temperature": 0})
    words = [len(response.split()) for response in responses]
    scores = share_of_early_letters(None, responses)
    assert results["val/reward/mean"] == pytest.approx(sum(scores) / 7, abs=1e-6)
    assert results["val/reward/share_of_early_letters"] == results["val/reward/mean"]
    assert results["val/reward/std"] == pytest.approx(torch.tensor(scores).std().item(), abs=1e-6)
    assert results["val/words"] == pytest.approx(sum(words) / 7, abs=1e-6)
    assert results["val/batch"] == pytest.approx((6 * 3 + 1) / 7, abs=1e-6)  # weighed by how many responses it is of
    assert results["val/response/truncation_rate"] == pytest.approx(sum(n == 6 for n in words) / 7, abs=1e-6)
    assert results["step"] == 0.0
    assert len(set(responses)) > 2
    assert {"val/response/length", "val/response/eos_rate", "val/long"} <= set(results)


def test_what_does_not_apply_is_left_out_of_the_mean():
    def some(prompts, responses):
        return {"odd": [float(i) if i % 2 else None for i in range(len(responses))], "none": [None] * len(responses)}

    results = validated(ppo(metric_fn=some), batch_size=7)
    assert results["val/odd"] == 3.0
    assert "val/none" not in results


def test_responses_are_those_of_seed_loader_and_row_whatever_the_batches():
    whole, parts, other = (validated(ppo(seed=seed), batch_size=size) for seed, size in ((1, 7), (1, 2), (2, 7)))
    assert whole == pytest.approx(parts, abs=1e-6)
    assert whole["val/reward/mean"] != other["val/reward/mean"]
    again = validated(ppo(seed=1, sampling={"max_new_tokens": 6, "temperature": 1.0}, evaluation_sampling=None))
    assert again == pytest.approx(whole, abs=1e-6)


def test_evaluation_may_draw_otherwise_than_rollouts():
    results = validated(ppo(evaluation_sampling={"max_new_tokens": 2}))
    assert results["val/response/length"] <= 2
    module = ppo(evaluation_sampling={"temperature": 0, "top_k": 3})
    assert module.evaluation_sampling.max_new_tokens == 6
    assert module.sampling.temperature == 1.0


@pytest.mark.invariant(40)
def test_training_is_the_same_with_and_without_validation():
    runs = []
    for validation in (None, HELD_OUT):
        seen = Seen()
        data = PromptDataModule(PROMPTS, validation=validation, batch_size=3)
        trainer = bare_trainer(max_epochs=2, callbacks=[seen], val_check_interval=1)
        trainer.fit(ppo(metric_fn=lengths), datamodule=data)
        runs.append(
            [
                {k: v for k, v in metrics.items() if not k.startswith(("time/", "speed/", "val/"))}
                for metrics in seen.metrics
            ]
        )
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4
    assert "val/words" in trainer.callback_metrics


def test_the_x_axis_is_the_iteration_and_callbacks_see_what_is_measured(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val/reward/mean", mode="max", save_top_k=1)
    stop = EarlyStopping("val/reward/mean", mode="max", stopping_threshold=-1.0)
    logger = CSVLogger(tmp_path)
    trainer = bare_trainer(
        max_epochs=5, callbacks=[keep, stop], enable_checkpointing=True, logger=logger, val_check_interval=1.0
    )
    trainer.fit(ppo(), datamodule=PromptDataModule(PROMPTS, validation=["a", "b"], batch_size=3))
    assert trainer.current_epoch == 1
    assert keep.best_model_score == trainer.callback_metrics["val/reward/mean"]
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val/reward/mean"]]
    assert [row["step"] for row in rows] == ["2"]  # after two iterations, where the third would begin; no sanity check
    assert float(rows[0]["val/reward/mean"]) == pytest.approx(float(keep.best_model_score), abs=1e-6)


def test_every_loader_is_measured_by_itself():
    loaders = [DataLoader(["a", "b"], batch_size=2), DataLoader([{"prompt": "c", "answer": "e"}], batch_size=1)]
    module = ppo(evaluation_sampling={"temperature": 0})
    results = bare_trainer().test(module, loaders, verbose=False)
    merged = {**results[0], **results[1]}
    scores = share_of_early_letters(None, module.generate(["a", "b", "c"], {"temperature": 0}))
    assert merged["test/reward/mean/dataloader_idx_0"] == pytest.approx(sum(scores[:2]) / 2, abs=1e-6)
    assert merged["test/reward/mean/dataloader_idx_1"] == pytest.approx(scores[2], abs=1e-6)


def test_a_loader_of_text_is_enough_to_train_on():
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(PROMPTS)]
    calls = []

    def reward(prompts, responses, answer):
        calls.append((prompts, answer))
        return [float(len(response)) for response in responses]

    text, ours = Seen(), Seen()
    bare_trainer(max_epochs=1, callbacks=[text]).fit(ppo(reward=reward), DataLoader(rows, batch_size=3))
    data = PromptDataModule(rows, batch_size=3, shuffle=False)
    bare_trainer(max_epochs=1, callbacks=[ours]).fit(ppo(reward=reward), datamodule=data)
    assert calls[:2] == calls[2:] == [(PROMPTS[:3], [0, 1, 2]), (PROMPTS[3:], [3, 4, 5])]
    assert [e.responses for e in text.experiences] == [e.responses for e in ours.experiences]


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.invariant(37, 40)
def test_two_processes_measure_what_one_does_and_filler_counts_nothing(monkeypatch):
    module = ppo(metric_fn=lengths)
    module.configure_model()
    whole = validated(module)
    report = Report()  # of both, as the sum over ranks is
    called = []
    monkeypatch.setattr("lightning_rlhf.modules.evaluation.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("lightning_rlhf.modules.evaluation.rank", lambda rank=rank: rank)
        data = PromptDataModule(validation=HELD_OUT, batch_size=3)
        data.tokenizer = module.tokenizer
        monkeypatch.setattr(PromptDataModule, "_place", (2, rank))
        loader = data.val_dataloader()
        module.on_validation_epoch_start()
        for batch in loader:
            called.append(len(batch))
            numbers, counts = module._next_rows(len(batch), loader, 0)
            module.evaluate(batch, numbers, counts, 0, report)
    assert called == [3, 1, 3, 1]  # four rows a rank, of seven
    statistics = report.reduce()
    for name in ("reward/mean", "words", "response/length"):
        assert statistics[name].mean == pytest.approx(whole[f"val/{name}"], abs=1e-6)


def test_a_batch_of_nothing_but_filler_is_not_scored():
    def never(prompts, responses):
        raise AssertionError

    module = ppo(reward=never, metric_fn=never)
    module.configure_model()
    data = PromptDataModule(validation=["a"])
    data.tokenizer = module.tokenizer
    (batch,) = data.val_dataloader()
    report = Report()
    module.evaluate(batch, [1], torch.tensor([False]), 0, report)
    assert report.reduce() == {}


# --- imitation --------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "a b", "response": "c d e f g h"}, {"prompt": "c", "response": "d"}, "b c d e f"]


def by_hand(model, rows=ROWS):
    vocabulary = word_tokenizer().get_vocab()
    total, count = 0.0, 0
    for row in rows:
        words = row.split() if isinstance(row, str) else row["prompt"].split() + row["response"].split()
        given = 1 if isinstance(row, str) else len(row["prompt"].split())
        ids = torch.tensor([vocabulary[word] for word in words] + [vocabulary["<eos>"]])
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[t - 1, ids[t]].detach()) for t in range(given, len(ids)))
        count += len(ids) - given
    return total / count


@pytest.mark.invariant(40)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_loss_of_held_out_rows_is_the_mean_over_their_tokens(batch_size):
    module = SFTModule(network(tiny_gpt2()), tokenizer=word_tokenizer())  # with dropout, which evaluation leaves out
    data = ConversationDataModule(validation=ROWS, test=ROWS[:1], batch_size=batch_size)
    (validation,) = bare_trainer().validate(module, datamodule=data, verbose=False)
    (test,) = bare_trainer().test(module, datamodule=data, verbose=False)
    assert validation["val/policy/loss"] == pytest.approx(by_hand(network(tiny_gpt2())), abs=1e-5)
    assert test["test/policy/loss"] == pytest.approx(by_hand(network(tiny_gpt2()), ROWS[:1]), abs=1e-5)


def test_imitation_is_the_same_with_and_without_validation_and_can_be_stopped_by_it():
    losses = []
    for validation in (None, ROWS):
        module = SFTModule(network(tiny_gpt2()), tokenizer=word_tokenizer())
        data = ConversationDataModule(ROWS, validation=validation, batch_size=1)
        callbacks = [EarlyStopping("val/policy/loss", stopping_threshold=1e9)] if validation else []
        trainer = bare_trainer(max_epochs=3 if validation else 1, callbacks=callbacks)
        trainer.fit(module, datamodule=data)
        losses.append(float(trainer.callback_metrics["policy/loss"]))
        assert trainer.current_epoch == 1
    assert losses[0] == losses[1]


# --- prediction -------------------------------------------------------------------------------------------------------


def sft(**arguments):
    return SFTModule(network(tiny_gpt2()), tokenizer=word_tokenizer(), **arguments)


@pytest.mark.parametrize("make", [ppo, sft])
def test_predictions_are_rows_with_their_responses(make):
    module = make(evaluation_sampling={"temperature": 0, "max_new_tokens": 4})
    batches = bare_trainer().predict(module, datamodule=PromptDataModule(predict=HELD_OUT, batch_size=4))
    rows = [row for batch in batches for row in batch]
    responses = module.generate(list("abcdefg"), {"temperature": 0, "max_new_tokens": 4})
    assert rows == [
        {**row, "response": response, "row": number}
        for number, (row, response) in enumerate(zip(HELD_OUT, responses, strict=True))
    ]
    (texts,) = bare_trainer().predict(module, DataLoader(["a", "b"], batch_size=2))
    assert [row["response"] for row in texts] == responses[:2]


def test_filler_is_not_predicted():
    class OfTwo(PromptDataModule):
        _place = (2, 1)  # the second of two processes, which reads rows 1, 3 and, to fill up, row 0 as number 5

    module = ppo()
    trainer = bare_trainer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_rlhf.modules.evaluation.world_size", lambda: 2)
        patch.setattr("lightning_rlhf.modules.evaluation.rank", lambda: 1)
        (rows,) = trainer.predict(module, datamodule=OfTwo(predict=list("abcde")))
    assert [(row["row"], row["prompt"]) for row in rows] == [(1, "b"), (3, "d")]


# --- what users get wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"`metric_fn` 'measure' returned \[1.0\]: it must return a dict"),
        ({"n": [1.0]}, r"`metric_fn` 'measure' returned 1 numbers as 'n' for 3 responses: it must return one for each"),
        ({"n": math.nan}, r"`metric_fn` 'measure' gave nan for 'n': it must be finite"),
        ({"n": [1, "x", 2]}, r"`metric_fn` 'measure' gave 'x' for 'n' of response 1 \("),
        ({3: 1.0}, r"it must return a dict, from the name of a metric"),
        ({"reward/mean": 1.0}, r"`metric_fn` 'measure' returned 'reward/mean', which is logged anyway: take another"),
    ],
)
def test_a_metric_that_does_not_fit(returned, message):
    def measure(prompts, responses):
        return returned

    with pytest.raises(ValueError, match=message):
        validated(ppo(metric_fn=measure))


def test_a_metric_that_raises_or_is_none():
    def measure(prompts, responses):
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="`metric_fn` 'measure' raised KeyError: 'answer' .on 3 responses"):
        validated(ppo(metric_fn=measure))
    with pytest.raises(TypeError, match="`metric_fn=3` must be callable: it gets prompts and responses, and returns a"):
        ppo(metric_fn=3)
    with pytest.raises(ValueError, match="`metric_fn='my_metrics.f'` must be a callable or the dotted name"):
        ppo(metric_fn="my_metrics.f")


def test_sampling_that_is_misspelt():
    with pytest.raises(TypeError, match=r"`evaluation_sampling` knows no \['temprature'\]"):
        ppo(evaluation_sampling={"temprature": 0})


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_data_that_is_missing(verb):
    name = {"validate": "validation"}.get(verb, verb)
    evaluate = functools.partial(getattr(bare_trainer(), verb), ppo())
    with pytest.raises(ValueError, match=f"`{name}` is not given to PromptDataModule, and `{verb}` needs rows: pass `"):
        evaluate(datamodule=PromptDataModule(["a"]))
    with pytest.raises(ValueError, match="`prompts` is not given to PromptDataModule: there is nothing to learn from"):
        bare_trainer(max_epochs=1).fit(ppo(), datamodule=PromptDataModule(**{name: ["a"]}))


def test_a_row_of_held_out_data_is_named_as_such():
    with pytest.raises(ValueError, match=r"`validation\[1\]` has no key 'prompt'"):
        PromptDataModule(["a"], validation=["b", {"question": "c"}])
    with pytest.raises(ValueError, match=r"`test\[0\]` has the keys \['prompt'\]"):
        ConversationDataModule(["a"], test=[{"prompt": "c"}])
    with pytest.raises(ValueError, match=r"`validation\[0\]`: `prompt=3` must be text"):
        validated(ppo(), rows=[3])


def test_data_of_another_kind():
    with pytest.raises(TypeError, match="`val_dataloaders` or `datamodule` yields ImitationBatch, and PPOModule is m"):
        bare_trainer().validate(ppo(), datamodule=ConversationDataModule(validation=["a b"]))
    with pytest.raises(ValueError, match="`predict` is not given to ConversationDataModule, .* PromptDataModule takes"):
        bare_trainer().predict(sft(), datamodule=ConversationDataModule(["a b"]))


def test_a_users_own_distributed_loader_counts_no_row_twice():
    sampler = DistributedSampler(list("abc"), num_replicas=2, rank=1, shuffle=False)
    loader = DataLoader(list("abc"), sampler=sampler, batch_size=2)
    module = ppo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_rlhf.modules.evaluation.world_size", lambda: 2)
        patch.setattr("lightning_rlhf.modules.evaluation.rank", lambda: 1)
        assert [module._next_rows(len(batch), loader, 0)[1].tolist() for batch in loader] == [[True, False]]
