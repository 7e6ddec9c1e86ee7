"""What Lightning's progress bars show of an iteration; the default one is Rich's."""

import io
import sys

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_rlhf import PPOModule
from lightning_rlhf.callbacks import SampleTable
from tests.training import fit, module_of

METRICS = ("reward/mean", "kl/sequence", "speed/tokens_per_second")


class Watched(PPOModule):
    """Looks at the bar in each of its phases, and after the last."""

    def look(self, phase):
        self.__dict__.setdefault("seen", []).append((phase, self.description()))

    def description(self):
        bar = self.trainer.progress_bar_callback
        return bar.train_progress_bar.desc if isinstance(bar, TQDMProgressBar) else bar.train_progress_bar.description

    def rollout(self, prompts):
        self.look("generate")
        return super().rollout(prompts)

    def score(self, rollouts):
        self.look("score")
        return super().score(rollouts)

    def update(self, minibatch):
        self.look("update")
        super().update(minibatch)

    def on_train_batch_end(self, *args):
        self.look("")


def shown(monkeypatch, *bars, **flags):
    """What was written to the terminal, and the module."""
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    module = module_of(Watched, minibatch_size=6, num_epochs=1)
    fit(module, iterations=2, callbacks=list(bars), enable_progress_bar=True, **flags)
    return terminal.getvalue(), module


@pytest.mark.parametrize("bars", [[], [RichProgressBar()], [TQDMProgressBar()]], ids=["default", "rich", "tqdm"])
def test_a_bar_shows_epoch_phase_reward_divergence_and_speed(monkeypatch, bars):
    text, module = shown(monkeypatch, *bars)
    phases = ["generate", "score", "update", ""]
    expected = [(phase, f"Epoch {epoch}/1 {phase}") for epoch in (0, 1) for phase in phases]
    assert [(phase, description.rstrip(" :")) for phase, description in module.seen] == [
        (phase, description.rstrip()) for phase, description in expected
    ]
    for name in METRICS:
        assert name in text
    if not isinstance(module.trainer.progress_bar_callback, TQDMProgressBar):
        assert isinstance(module.trainer.progress_bar_callback, RichProgressBar)  # which draws now and then
    else:
        assert all(phase in text for phase in phases)


def test_the_description_keeps_its_width(monkeypatch):
    _, module = shown(monkeypatch, RichProgressBar())
    assert len({len(description) for _, description in module.seen}) == 1


def test_a_bar_that_is_off_or_somebody_elses_is_left_alone(monkeypatch):
    class Own(ProgressBar):
        is_enabled = True

        def disable(self):
            pass

        def enable(self):
            pass

        @property
        def train_progress_bar(self):
            raise AssertionError("nobody but me touches it")

    monkeypatch.setattr(Watched, "description", lambda self: "")
    for bar in (Own(), TQDMProgressBar(refresh_rate=0), RichProgressBar(refresh_rate=0)):
        text, module = shown(monkeypatch, bar)
        assert len(module.seen) == 8
        assert "Epoch" not in text


def test_without_a_limit_of_epochs_there_is_no_last(monkeypatch):
    module = module_of(Watched, minibatch_size=6, num_epochs=1)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    fit(module, iterations=-1, max_steps=1, callbacks=[TQDMProgressBar()], enable_progress_bar=True)
    assert module.seen[0] == ("generate", "Epoch 0 generate: ")


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_samples_are_printed_whole_above_a_bar(monkeypatch, bar):
    text, _ = shown(monkeypatch, bar(), SampleTable(every_n_iterations=1, num_rows=1))
    for iteration in (0, 1):
        title = next(line for line in text.splitlines() if f"Samples of iteration {iteration}" in line)
        assert "Epoch" not in title
