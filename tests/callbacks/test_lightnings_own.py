"""Lightning's own callbacks with a module that makes many updates an iteration; docs/howto/callbacks.md lists them."""

import csv
import functools
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf import PPOModule, PromptDataModule
from tests.training import PROMPTS, bare_trainer, fit, module_of


class Scores:
    """A reward that is told its mean."""

    def __init__(self, *means):
        self.means = list(means)

    def __call__(self, prompts, responses):
        return [self.means.pop(0)] * len(responses)


def ppo(*means, **arguments):
    """Two updates an iteration."""
    reward = {"reward": Scores(*means)} if means else {}
    return module_of(PPOModule, minibatch_size=3, num_epochs=1, **reward, **arguments)


def logged(folder, name):
    with (folder / "metrics.csv").open() as lines:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name)}


def csv_logger(folder):
    return CSVLogger(folder, name="", version="")


@pytest.mark.parametrize(("mode", "kept"), [("max", [1, 3]), ("min", [0, 2])])
def test_model_checkpoint_keeps_the_best_epochs(tmp_path, mode, kept):
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="reward/mean", mode=mode, save_top_k=2, save_last=True)
    fit(ppo(0.2, 0.5, 0.1, 0.4), iterations=4, callbacks=[keep], enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"epoch={i}.ckpt" for i in kept), "last.ckpt"]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (state["global_step"], state["lightning_rlhf"]["iteration"]) == (2 * (kept[-1] + 1), kept[-1] + 1)


def test_model_checkpoint_saves_every_so_many_epochs(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=2, save_top_k=-1)
    fit(ppo(), iterations=4, callbacks=[keep], enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize(("every", "saved", "missed"), [(1, [2, 4, 6], 0), (4, [4], 0), (3, [6], 1), (5, [], 1)])
def test_model_checkpoint_misses_multiples_within_an_iteration_and_the_module_says_so(
    tmp_path, monkeypatch, every, saved, missed
):
    warned = []
    monkeypatch.setattr("lightning_rlhf.modules.trainer_checks.rank_zero_warn", warned.append)
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=every, save_on_train_epoch_end=False)
    fit(ppo(), iterations=3, callbacks=[keep], enable_checkpointing=True)  # which end after 2, 4 and 6 updates
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={step}.ckpt" for step in saved]
    assert len(warned) == missed
    for message in warned:
        assert message.startswith(f"`ModelCheckpoint(every_n_train_steps={every})` missed a checkpoint: it counts the")
        assert "Use `lightning_rlhf.callbacks.RolloutCheckpoint(every_n_rollouts=...)`" in message


@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model", "ignore:.*no last checkpoint")
def test_the_checkpoint_of_an_exception_is_written(tmp_path):
    class StopError(Exception):
        pass

    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if module.iteration == 2:
                raise StopError

    with pytest.raises(StopError):
        fit(ppo(), iterations=4, callbacks=[Stops(), OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    (path,) = tmp_path.iterdir()
    assert torch.load(path, weights_only=True)["lightning_rlhf"]["iteration"] == 2


def test_early_stopping_stops_between_two_iterations():
    stop = EarlyStopping("reward/mean", mode="max", patience=2)
    module = ppo(0.1, 0.5, 0.4, 0.3, 0.9)
    fit(module, iterations=5, callbacks=[stop])
    assert module.iteration == 4
    assert float(stop.best_score) == pytest.approx(0.5)


def test_early_stopping_can_look_after_every_iteration_of_an_epoch():
    """By its own hook it looks once an epoch."""

    class Often(EarlyStopping):
        def on_train_batch_end(self, trainer, *args):
            self._run_early_stopping_check(trainer)

    module = ppo(0.5, 0.4, 0.3, 0.9)
    trainer = bare_trainer(max_epochs=1, callbacks=[Often("reward/mean", mode="max", patience=2)])
    trainer.fit(module, datamodule=PromptDataModule(PROMPTS * 4, batch_size=6))
    assert module.iteration == 3


def test_learning_rate_monitor_logs_the_rate_that_an_iteration_begins_with(tmp_path):
    module = ppo(lr_scheduler="linear", optimizer=functools.partial(torch.optim.SGD, lr=0.4), kl_coef=0.0)
    monitor = LearningRateMonitor(logging_interval="step", log_weight_decay=True)
    fit(module, iterations=4, callbacks=[monitor], logger=csv_logger(tmp_path))
    rates = {group: logged(tmp_path, f"lr-SGD/{group}") for group in ("policy", "value")}
    assert rates["policy"] == pytest.approx({0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, abs=1e-7)
    assert rates["value"] == rates["policy"]


def test_timer_stops_between_two_iterations_and_knows_the_time():
    timer = Timer(duration=timedelta(microseconds=1), interval="step")
    module = ppo()
    fit(module, iterations=3, callbacks=[timer])
    assert module.iteration == 1
    assert timer.time_elapsed("train") > 0


def test_device_stats_monitor_logs_every_iteration(tmp_path):
    fit(ppo(), iterations=2, callbacks=[DeviceStatsMonitor(cpu_stats=True)], logger=csv_logger(tmp_path))
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        used = logged(tmp_path, f"DeviceStatsMonitor.{hook}/cpu_vm_percent")
        assert sorted(used) == [0, 1]
        assert all(0 < share <= 100 for share in used.values())


@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
def test_summaries_count_what_trains(summary, capsys, caplog):
    module = ppo()
    fit(module, iterations=1, callbacks=[summary(max_depth=2)], enable_model_summary=True)
    shown = capsys.readouterr().out + caplog.text
    number = sum(parameter.numel() for parameter in module.parameters())
    assert "policy.decoder" in shown
    assert f"{number / 1000:.1f} K" in shown
