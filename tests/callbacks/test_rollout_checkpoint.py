import contextlib
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import AutoModelForCausalLM

from lightning_rlhf import ConversationDataModule, PPOModule, PromptDataModule
from lightning_rlhf.callbacks import RolloutCheckpoint
from lightning_rlhf.callbacks.rollout_checkpoint import tidy
from tests.training import PROMPTS, bare_trainer, module_of, sft


class Scores:
    """A reward that is told its mean."""

    def __init__(self, *means):
        self.means = list(means)

    def __call__(self, prompts, responses):
        return [self.means.pop(0)] * len(responses)


def run(*keepers, iterations=6, module=None, data=None, callbacks=(), **flags):
    """So many iterations, two updates each."""
    ckpt_path = flags.pop("ckpt_path", None)
    module = module or module_of(PPOModule, minibatch_size=3, num_epochs=1, kl_coef=0.0)
    trainer = bare_trainer(
        max_epochs=1,
        limit_train_batches=iterations,
        callbacks=[*keepers, *callbacks],
        enable_checkpointing=True,
        **flags,
    )
    data = data or PromptDataModule(PROMPTS * iterations, batch_size=6)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def iteration_in(path):
    state = torch.load(path, weights_only=True)
    return state["lightning_rlhf"]["iteration"]


def same_weights(checkpoint, folder):
    """Whether what training would go on with is what transformers loads."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    prefix = "policy.decoder.model."
    mine = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    assert mine.keys() == model.keys()
    return all(torch.equal(mine[name], model[name]) for name in model)


def test_it_counts_rollouts_and_keeps_the_policy_of_each_checkpoint_as_a_folder(tmp_path):
    run(RolloutCheckpoint(tmp_path, every_n_rollouts=2, save_top_k=-1), iterations=5)
    assert names(tmp_path) == ["iteration=2", "iteration=2.ckpt", "iteration=4", "iteration=4.ckpt"]
    for n in (2, 4):
        assert iteration_in(tmp_path / f"iteration={n}.ckpt") == n
        assert same_weights(tmp_path / f"iteration={n}.ckpt", tmp_path / f"iteration={n}")
    assert not same_weights(tmp_path / "iteration=2.ckpt", tmp_path / "iteration=4")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names(tmp_path / "iteration=4"))


def test_the_best_stay_and_the_folders_of_the_others_go_with_them(tmp_path):
    keep = RolloutCheckpoint(tmp_path, every_n_rollouts=1, monitor="reward/mean", save_top_k=2)
    reward = Scores(0.1, 0.5, 0.2, 0.4, 0.3, 0.0)
    run(keep, module=module_of(PPOModule, reward=reward, minibatch_size=6, num_epochs=1, kl_coef=0.0))
    assert names(tmp_path) == ["iteration=2", "iteration=2.ckpt", "iteration=4", "iteration=4.ckpt"]
    assert Path(keep.best_model_path).name == "iteration=2.ckpt"
    assert float(keep.best_model_score) == pytest.approx(0.5)


def test_the_lowest_is_the_best_if_asked_for(tmp_path):
    keep = RolloutCheckpoint(tmp_path, every_n_rollouts=1, monitor="reward/mean", mode="min")
    reward = Scores(0.3, 0.1, 0.2)
    run(keep, module=module_of(PPOModule, reward=reward, kl_coef=0.0), iterations=3)
    assert names(tmp_path) == ["iteration=2", "iteration=2.ckpt"]


@pytest.mark.parametrize("save_last", [True, "link"])
def test_last_is_the_latest(tmp_path, save_last):
    run(RolloutCheckpoint(tmp_path, every_n_rollouts=2, save_last=save_last), iterations=5)
    assert names(tmp_path) == ["iteration=4", "iteration=4.ckpt", "last", "last.ckpt"]
    assert iteration_in(tmp_path / "last.ckpt") == 4
    assert same_weights(tmp_path / "last.ckpt", tmp_path / "last")
    assert (tmp_path / "last").is_symlink() == (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")


def test_only_last_is_kept_if_nothing_else_is(tmp_path):
    run(RolloutCheckpoint(tmp_path, every_n_rollouts=2, save_last=True, save_top_k=0), iterations=4)
    assert names(tmp_path) == ["last", "last.ckpt"]
    assert iteration_in(tmp_path / "last.ckpt") == 4


@pytest.mark.parametrize(("before", "after"), [(True, "link"), ("link", True)])
def test_last_may_become_a_link_and_a_copy_again(tmp_path, before, after):
    run(RolloutCheckpoint(tmp_path, every_n_rollouts=1, save_last=before), iterations=4, max_steps=4)
    keep = RolloutCheckpoint(tmp_path, every_n_rollouts=1, save_last=after)
    run(keep, iterations=4, ckpt_path=tmp_path / "last.ckpt")
    assert iteration_in(tmp_path / "last.ckpt") == 4
    assert same_weights(tmp_path / "last.ckpt", tmp_path / "last")
    assert (tmp_path / "last").is_symlink() == (after == "link")


def test_names_hold_iterations_epochs_updates_and_metrics(tmp_path):
    reward = Scores(0.25)
    keep = RolloutCheckpoint(
        tmp_path,
        "i{iteration:03d}-e{epoch}-u{step}-r{reward/mean:.2f}",
        every_n_rollouts=1,
        auto_insert_metric_name=False,
    )
    module = module_of(PPOModule, reward=reward, minibatch_size=3, num_epochs=1, kl_coef=0.0)
    run(keep, module=module, iterations=1)
    assert names(tmp_path) == ["i001-e0-u2-r0.25", "i001-e0-u2-r0.25.ckpt"]


def test_it_saves_when_the_time_has_passed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Callback):
        def on_train_batch_start(self, *args):
            now[0] += 40

    keep = RolloutCheckpoint(tmp_path, train_time_interval=timedelta(minutes=1), save_top_k=-1, save_policy=False)
    run(keep, callbacks=[Slow()])  # at 40, 80, 120, 160, 200 and 240 seconds
    assert names(tmp_path) == ["iteration=2.ckpt", "iteration=4.ckpt", "iteration=6.ckpt"]


def test_either_reason_is_enough(tmp_path):
    keep = RolloutCheckpoint(
        tmp_path, every_n_rollouts=2, train_time_interval=timedelta(hours=1), save_top_k=-1, save_policy=False
    )
    run(keep, iterations=4)
    assert names(tmp_path) == ["iteration=2.ckpt", "iteration=4.ckpt"]


class Validated(PPOModule):
    def validation_step(self, batch, batch_idx):
        self.log("val/score", float(self.iteration % 3), batch_size=1)


class WithValidation(PromptDataModule):
    def val_dataloader(self):
        items = [self.tokenized(row, number) for number, row in enumerate(self.rows[:1])]
        return torch.utils.data.DataLoader(items, collate_fn=self.collate)


def test_a_metric_of_the_evaluation_is_waited_for(tmp_path):
    keep = RolloutCheckpoint(tmp_path, every_n_rollouts=1, monitor="val/score", save_policy=False)
    module = module_of(Validated, kl_coef=0.0, num_epochs=1)
    run(
        keep,
        module=module,
        data=WithValidation(PROMPTS * 6, batch_size=6),
        val_check_interval=2,
        num_sanity_val_steps=1,
    )
    assert names(tmp_path) == ["iteration=2.ckpt"]  # the first two iterations have no metric yet; at 2 it is 2
    assert float(keep.best_model_score) == 2.0


def test_a_resumed_run_knows_what_is_best(tmp_path):
    def keep():
        return RolloutCheckpoint(tmp_path, every_n_rollouts=1, monitor="reward/mean", save_last=True, save_policy=False)

    def module(*means):
        return module_of(PPOModule, reward=Scores(*means), minibatch_size=6, num_epochs=1, kl_coef=0.0)

    run(keep(), module=module(0.5, 0.1), iterations=4, max_steps=2)
    resumed = keep()
    run(resumed, module=module(0.3, 0.7), iterations=4, ckpt_path=tmp_path / "last.ckpt")
    assert names(tmp_path) == ["iteration=4.ckpt", "last.ckpt"]
    assert float(resumed.best_model_score) == pytest.approx(0.7)


class Killed(BaseException):
    pass


def is_seen(path, folder):
    """Whether no part of it is hidden."""
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


@pytest.mark.slow
@pytest.mark.invariant(39)
@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("place", [os, shutil, TorchCheckpointIO], ids=["replace", "rmtree", "write"])
def test_wherever_a_run_is_killed_every_checkpoint_is_whole_and_has_its_whole_folder(
    tmp_path, monkeypatch, place, save_last
):
    """Stops the second save at one after the other of the calls by which it changes what is in the folder."""
    name = {os: "replace", shutil: "rmtree", TorchCheckpointIO: "save_checkpoint"}[place]
    function = getattr(place, name)
    module = module_of(PPOModule, minibatch_size=6, num_epochs=1, kl_coef=0.0)
    fatal_call = calls = 0
    while calls == fatal_call:  # until a run has fewer
        fatal_call, calls = fatal_call + 1, 0
        folder = tmp_path / str(fatal_call)

        def deadly(*args, folder=folder, fatal_call=fatal_call, **kwargs):
            nonlocal calls
            where = Path(args[-1] if place is os else args[0] if place is shutil else args[2])
            if module.iteration == 2 and folder in where.parents and (place is not os or is_seen(where, folder)):
                calls += 1
                if calls == fatal_call:
                    for path in sorted(where.glob("*.json")) if place is shutil else []:
                        path.unlink()  # it had come so far
                    raise Killed
            return function(*args, **kwargs)

        module.iteration = 0
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(place, name, deadly)
            run(RolloutCheckpoint(folder, every_n_rollouts=1, save_last=save_last), module=module, iterations=2)
        tidy(folder)  # what the next run does first
        checkpoints = {path.stem: path for path in folder.glob("*.ckpt")}
        assert len(checkpoints) >= 2
        for checkpoint in checkpoints.values():
            iteration_in(checkpoint)
            AutoModelForCausalLM.from_pretrained(checkpoint.with_suffix(""))
            if checkpoint.stem != "last":
                assert same_weights(checkpoint, checkpoint.with_suffix(""))
        assert [path for path in names(folder) if path.startswith(".")] == []
        for path in folder.iterdir():
            assert path.suffix in (".ckpt", ".old") or len(names(path)) == 5, path
    assert fatal_call > 1


def test_what_a_killed_run_was_about_to_replace_is_put_back_and_nothing_of_others_is_touched(tmp_path):
    for name in (
        "last.old",
        "sharded.ckpt.old",
        ".last.policy-unfinished",
        "..x.policy-unfinished.ab",
        "mine.old",
        ".hidden.tmp",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "last.ckpt").touch()
    tidy(tmp_path)
    assert names(tmp_path) == [".hidden.tmp", "last", "last.ckpt", "mine.old", "sharded.ckpt"]
    (tmp_path / "last.old").mkdir()
    tidy(tmp_path)
    assert names(tmp_path) == [".hidden.tmp", "last", "last.ckpt", "last.old", "mine.old", "sharded.ckpt"]


def test_nothing_is_saved_in_a_development_run(tmp_path):
    run(RolloutCheckpoint(tmp_path / "kept", every_n_rollouts=1), fast_dev_run=True)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`every_n_rollouts=None` and `train_time_interval=None` never save: give one of them"),
        ({"every_n_rollouts": 0}, "`every_n_rollouts=0` must be at least 1"),
    ],
)
def test_it_must_be_told_when(arguments, message):
    with pytest.raises(ValueError, match=message):
        RolloutCheckpoint(**arguments)


def test_a_module_that_does_not_roll_out_is_refused(tmp_path):
    keep = RolloutCheckpoint(tmp_path, every_n_rollouts=1)
    trainer = bare_trainer(max_epochs=1, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(ValueError, match="`RolloutCheckpoint` counts rollouts, and SFTModule makes none: use Light"):
        trainer.fit(sft(), datamodule=ConversationDataModule(["a b c"]))


def test_a_policy_is_written_to_a_local_folder_only():
    with pytest.raises(ValueError, match=r"`dirpath='memory://x'` is no local folder, .* `save_policy=False`"):
        run(RolloutCheckpoint("memory://x", every_n_rollouts=1), iterations=1)


def test_a_sharded_checkpoint_is_not_written_over_another(tmp_path, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "_save_distributed_checkpoint", True, raising=False)
    with pytest.raises(ValueError, match="`save_last=True` would write a sharded checkpoint over the last one, .*link"):
        run(RolloutCheckpoint(tmp_path, every_n_rollouts=1, save_last=True), iterations=1)
