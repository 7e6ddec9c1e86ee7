"""A run that was cut anywhere and resumed is the run that was not: sixteen cuts of each module."""

from dataclasses import replace

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_rlhf.models.reference import fingerprint
from tests.runs.recording import CASES, assert_goes_on, run

pytestmark = [
    pytest.mark.invariant(36),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

BATCHES = 3  # of an epoch
LONG = {"max_epochs": 3}


class Everywhere(Callback):
    """Saves in every hook in which checkpoints are saved, and counts batches."""

    def __init__(self, folder):
        self.folder, self.batches = folder, 0

    def on_train_batch_end(self, trainer, *args):
        self.batches += 1
        trainer.save_checkpoint(self.folder / f"batch={self.batches}.ckpt")

    def on_validation_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"validated={self.batches}.ckpt")

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"epoch={self.batches}.ckpt")


def limit_of(name, places):
    """Three epochs, or as many steps as are done after the second batch of the third one."""
    return LONG if name == "max_epochs" else {"max_steps": places[2 * BATCHES + 1]["global_step"], "max_epochs": -1}


@pytest.fixture(scope="module")
def steps():
    """What a run of three epochs does, by case: for its counts of steps."""
    return {name: run(case, **LONG).places for name, case in CASES.items()}


QUICK = ("ppo", "sft")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("with_val", [False, True], ids=["", "validated"])
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, steps, name, limit, with_val):
    case, flags = CASES[name], limit_of(limit, steps[name])
    whole = run(case, with_val=with_val, callbacks=[Everywhere(tmp_path)], **flags)
    assert len(whole.places) == (9 if limit == "max_epochs" else 8)
    cuts = {"batch=5": 5, "batch=6": 6, "epoch=3": 3}
    cuts |= {"validated=6": 6} if with_val else {"epoch=6": 6}
    if "accumulate_grad_batches" in case.flags:  # in the middle of a window, which begins anew
        cuts["batch=4"] = 3
    for cut, done in cuts.items():
        resumed = run(case, tmp_path / f"{cut}.ckpt", with_val, **flags)
        assert_goes_on(whole, resumed, done)


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_came_to_its_end_goes_on_under_a_higher_limit(tmp_path, steps, name, limit):
    # With a rate that does not depend on where the end is.
    case = CASES[name]
    case = replace(case, arguments={**case.arguments, "lr_scheduler": "constant"})
    whole = run(case, **limit_of(limit, steps[name]))
    for batches in (5, 6):  # in the middle of an epoch, and at its end
        shorter = run(case, max_epochs=-1, max_steps=steps[name][batches - 1]["global_step"])
        assert shorter.places == whole.places[:batches]
        shorter.trainer.save_checkpoint(tmp_path / "ended.ckpt")
        resumed = run(case, tmp_path / "ended.ckpt", **limit_of(limit, steps[name]))
        assert_goes_on(whole, resumed, batches)


def test_the_last_checkpoint_is_found_and_gone_on_with(tmp_path):
    def keep():
        return ModelCheckpoint(
            tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1, save_on_train_epoch_end=False
        )

    case = CASES["ppo"]
    whole = run(case, **LONG)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 4

    run(case, callbacks=[keep(), Stop()], **LONG)
    resumed = run(case, "last", callbacks=[keep()], **LONG)
    assert_goes_on(whole, resumed, 5)


class Cut(Callback):
    """Saves after every batch, and ends the run after so many."""

    def __init__(self, folder, batches):
        self.path, self.left = folder / "cut.ckpt", batches

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.path)
        self.left -= 1

    def on_train_batch_start(self, *args):
        if not self.left:
            raise ConnectionError("killed")


@pytest.mark.parametrize("with_val", [False, True], ids=["", "validated"])
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_a_run_that_is_cut_again_and_again_comes_to_the_same_end(tmp_path, steps, limit, with_val):
    case, flags = CASES["ppo"], limit_of(limit, steps["ppo"])
    whole = run(case, with_val=with_val, **flags)
    for batches in (1, 3):
        begin = None
        for done in range(0, len(whole.places), batches):
            try:
                rest = run(case, begin, with_val, callbacks=[Cut(tmp_path, batches)], **flags)
            except ConnectionError:
                begin = tmp_path / "cut.ckpt"
                continue
            assert_goes_on(whole, rest, done)
        assert begin is not None


def test_a_checkpoint_loads_without_a_trainer(tmp_path):
    from tests.networks import tiny_gpt2, word_tokenizer
    from tests.training import share_of_early_letters

    policy = tiny_gpt2(initializer_range=0.3)
    for name, more in (("ppo", {"reward": share_of_early_letters}), ("sft", {})):
        case = CASES[name]
        left = run(case, max_epochs=1)
        left.trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        loaded = case.cls.load_from_checkpoint(
            tmp_path / f"{name}.ckpt", policy=policy, tokenizer=word_tokenizer(), **more
        )
        assert fingerprint(loaded.policy) == fingerprint(left.module.policy)
        if name == "ppo":
            assert (loaded.iteration, loaded.kl_coef) == (3, left.module.kl_coef)
            assert loaded.scaled.state_dict() == left.module.scaled.state_dict()


def test_the_x_axis_of_what_validation_logs_is_right_after_a_cut_between_two_batches(tmp_path):
    class Signalled(Callback):
        """Asks for an end where a SIGTERM would, after a batch and its validation."""

        def on_train_batch_end(self, trainer, *args):
            trainer._signal_connector.received_sigterm = trainer.fit_loop.total_batch_idx == 3

    case, often = CASES["sft"], {"val_check_interval": 1, **LONG}
    whole = run(case, with_val=True, **often)
    keep = ModelCheckpoint(tmp_path, filename="cut", save_on_exception=True, every_n_epochs=100)
    with pytest.raises(SystemExit):
        run(case, with_val=True, callbacks=[keep, Signalled()], **often)
    assert_goes_on(whole, run(case, tmp_path / "cut.ckpt", with_val=True, **often), 4)
