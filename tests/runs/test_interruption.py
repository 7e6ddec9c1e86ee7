"""Runs that are stopped by a signal or an error, and what they leave behind."""

import os
import signal
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.runs.recording import CASES, assert_goes_on, run
from tests.training import share_of_early_letters

pytestmark = [
    pytest.mark.invariant(36),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

LONG = {"max_epochs": 3}


@pytest.fixture(autouse=True)
def _handlers():
    """Lightning leaves SIGINT ignored when it was interrupted, and a shell does for what runs in its background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Signal(Callback):
    """Sends this process a signal in a hook of a batch, counted from 0."""

    def __init__(self, number, hook, batch):
        self.number, self.batch = number, batch
        setattr(self, hook, self.send)

    def send(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def kept(folder, **flags):
    flags = {"every_n_epochs": 100, "save_on_exception": True, **flags}
    return ModelCheckpoint(folder, filename="kept", enable_version_counter=False, **flags)


def interrupted(name, folder, *callbacks, **flags):
    """A run that ends early, with a checkpoint."""
    with pytest.raises(SystemExit):
        run(CASES[name], callbacks=[*callbacks, kept(folder)], **{**LONG, **flags})
    return folder / "kept.ckpt"


@pytest.fixture(scope="module")
def whole():
    return {(name, val): run(CASES[name], with_val=val, **LONG) for name in CASES for val in (False, True)}


@pytest.mark.parametrize("with_val", [False, True], ids=["", "validated"])
@pytest.mark.parametrize("batch", [0, 2, 4])
def test_a_run_that_is_told_to_end_finishes_its_batch_and_saves(tmp_path, whole, batch, with_val):
    for name, hook in (("ppo", "on_experience"), ("sft", "on_before_optimizer_step")):
        path = interrupted(name, tmp_path, Signal(signal.SIGTERM, hook, batch), with_val=with_val)
        resumed = run(CASES[name], path, with_val, **LONG)
        assert_goes_on(whole[name, with_val], resumed, batch + 1)


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_a_run_that_is_interrupted_while_it_writes_begins_its_iteration_anew(tmp_path, whole, batch):
    path = interrupted("ppo", tmp_path, Signal(signal.SIGINT, "on_experience", batch))
    assert [file.name for file in tmp_path.iterdir()] == ["kept.ckpt"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`ckpt_path` was written in the middle")
        assert_goes_on(whole["ppo", False], run(CASES["ppo"], path, **LONG), batch)


@pytest.mark.parametrize(("batch", "done"), [(3, 3), (4, 3), (5, 5), (7, 6)])
def test_an_interrupted_window_of_batches_begins_anew(tmp_path, whole, batch, done):
    path = interrupted("sft_accumulating", tmp_path, Signal(signal.SIGINT, "on_after_backward", batch))
    assert_goes_on(whole["sft_accumulating", False], run(CASES["sft_accumulating"], path, **LONG), done)


def test_an_iteration_that_was_interrupted_between_its_updates_is_begun_anew_and_says_so(tmp_path, whole):
    class Second(Callback):
        def on_before_optimizer_step(self, trainer, *args):
            if trainer.global_step == whole["ppo", False].places[3]["global_step"] + 1:
                os.kill(os.getpid(), signal.SIGINT)

    path = interrupted("ppo", tmp_path, Second())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = run(CASES["ppo"], path, **LONG)
    told = "in the middle of iteration 4, which begins anew with weights that it had updated 1 times: what follows is"
    assert sum(told in str(warning.message) for warning in caught) == 1
    expected = whole["ppo", False].places[4:]
    assert [place["iteration"] for place in resumed.places] == [place["iteration"] for place in expected]
    assert [place["data"] for place in resumed.places] == [place["data"] for place in expected]
    assert [place["rows"] for place in resumed.places] == [place["rows"] for place in expected]
    assert resumed.places[0]["weights"] != expected[0]["weights"]  # or the warning would be wrong


def test_ctrl_c_leaves_the_last_checkpoint_as_it_was(tmp_path, whole):
    class Second(Callback):
        def on_before_optimizer_step(self, trainer, *args):
            if trainer.global_step == whole["ppo", False].places[3]["global_step"] + 1:
                os.kill(os.getpid(), signal.SIGINT)

    every = {"save_last": True, "every_n_train_steps": 2, "every_n_epochs": None, "save_on_exception": False}
    with pytest.raises(SystemExit):
        run(CASES["ppo"], callbacks=[Second(), kept(tmp_path, save_on_train_epoch_end=False, **every)], **LONG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.ckpt", "last.ckpt"]
    assert_goes_on(whole["ppo", False], run(CASES["ppo"], tmp_path / "last.ckpt", **LONG), 4)


def test_a_signal_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, whole, monkeypatch):
    saved = []

    def save(checkpoint, path, *args, really=torch.save, **kwargs):
        saved.append(path)
        really(checkpoint, path, *args, **kwargs)
        if len(saved) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch, "save", save)
    every = {"every_n_train_steps": 2, "every_n_epochs": None, "save_on_exception": False}
    with pytest.raises(SystemExit):
        run(CASES["ppo"], callbacks=[kept(tmp_path, save_on_train_epoch_end=False, **every)], **LONG)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.ckpt"]
    assert_goes_on(whole["ppo", False], run(CASES["ppo"], tmp_path / "kept.ckpt", **LONG), 4)


def test_a_reward_that_fails_costs_no_iteration(tmp_path, whole):
    calls = []

    def failing(prompts, responses):
        calls.append(prompts)
        if len(calls) == 5:
            raise ConnectionError("gone")
        return share_of_early_letters(prompts, responses)

    failing.__name__ = share_of_early_letters.__name__
    case = CASES["ppo"]
    broken = type(case)(case.cls, arguments={**case.arguments, "reward": failing})
    with pytest.raises(RuntimeError, match="raised ConnectionError: gone"):
        run(broken, callbacks=[kept(tmp_path)], **LONG)
    assert_goes_on(whole["ppo", False], run(case, tmp_path / "kept.ckpt", **LONG), 4)
