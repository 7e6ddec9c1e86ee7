"""What an iteration tells loggers, progress bar and callbacks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_rlhf.batches import Experience, Rollouts, Scores
from lightning_rlhf.functional.kl import k1
from lightning_rlhf.functional.masked import masked_sum
from lightning_rlhf.modules.meter import Meter
from lightning_rlhf.modules.ranks import sum_over_ranks

SHOWN = ("reward/mean", "kl/sequence", "speed/tokens_per_second")
"""What the progress bar shows."""

WIDEST = len("generate")
"""Letters of the longest phase, so that a bar keeps its width."""


class Report(Meter):
    """The statistics of an iteration under the names that are logged."""

    @contextmanager
    def phase(self, name: str, trainer: L.Trainer) -> Iterator[None]:
        """Times a part of an iteration, and lets the progress bar say that it is under way.

        Args:
            name: Such as ``"score"``, which is logged as ``time/score``.
            trainer: Whose bar it is.
        """
        started = time.perf_counter()
        show_phase(trainer, name)
        yield
        show_phase(trainer, "")
        self.add(f"time/{name}", torch.tensor(time.perf_counter() - started, dtype=torch.float64))

    def observe(self, experience: Experience, eos: tuple[int, ...]) -> None:
        """Adds what can be said before the updates.

        Args:
            experience: Of this process.
            eos: The tokens that end a response.
        """
        self.observe_scored(experience, experience.scores, eos)
        mask = experience.sampled_mask
        if experience.ref_logprobs is not None:
            log_ratio = k1(experience.old_logprobs, experience.ref_logprobs)
            self.add("kl/token", log_ratio, mask)
            self.add("kl/sequence", masked_sum(log_ratio, mask, dim=1))

    def observe_scored(self, rollouts: Rollouts, scores: Scores, eos: tuple[int, ...]) -> None:
        """Adds what responses and their scores say, in training and evaluation alike.

        Args:
            rollouts: Of this process.
            scores: What the reward gave.
            eos: The tokens that end a response.
        """
        self.add("reward/mean", scores.total)
        for name, score in scores.by_name.items():
            self.add(f"reward/{name}", score, ~score.isnan())
        lengths = rollouts.response_mask.sum(1)
        last = rollouts.response_tokens.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        self.add("response/length", lengths)
        self.add("response/eos_rate", torch.isin(last, torch.tensor(eos, device=last.device)))
        self.add("response/truncation_rate", rollouts.truncated)
        if rollouts.kept_mass is not None:
            self.add("policy/kept_mass", rollouts.kept_mass, rollouts.sampled_mask)

    def send(self, module: L.LightningModule, iteration: int, tokens: torch.Tensor, seconds: float) -> None:
        """Reduces over all processes, and logs; a collective.

        Every iteration goes to every logger, whatever ``log_every_n_steps`` says, and to ``trainer.callback_metrics``,
        where checkpoints and early stopping look.

        Args:
            module: Whose trainer has the loggers.
            iteration: The x axis.
            tokens: That this process wrote.
            seconds: That the iteration took.
        """
        self.add("speed/tokens_per_second", sum_over_ranks(tokens) / seconds)
        statistics = self.reduce()
        metrics: dict[str, Any] = {name: statistic.mean for name, statistic in statistics.items()}
        metrics["reward/std"] = statistics["reward/mean"].std
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step=iteration)
        shown = {name: metrics.pop(name) for name in SHOWN if name in metrics}
        module.log_dict(metrics, logger=False, batch_size=1)
        module.log_dict(shown, logger=False, prog_bar=True, batch_size=1)


def show_phase(trainer: L.Trainer, phase: str) -> None:
    """Writes what is going on beside the epoch, on either of Lightning's progress bars; another bar is left alone.

    Args:
        trainer: Whose bar it is.
        phase: A word, or nothing.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", False):
        return
    epochs = trainer.max_epochs or 0
    last = f"/{epochs - 1}" if epochs > 0 else ""
    description = f"Epoch {trainer.current_epoch}{last} {phase:{WIDEST}}"
    if isinstance(bar, TQDMProgressBar):
        bar.train_progress_bar.set_description(description)
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, description=description)
        bar.refresh()
