"""Processes that are told to end, and end together."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_rlhf.modules.ranks import sum_over_ranks


class EndTogether:
    """Takes SIGTERM note of on each process, and lets all of them end after the same batch.

    Lightning's own handler tells the other processes at once. It runs between any two lines, also between two exchanges
    that others are waiting in, and then all wait for ever (seen with signals 0.3 seconds apart).

    Args:
        trainer: Before it registers its handlers.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.told = False
        trainer._signal_connector._sigterm_notifier_fn = self.take_note  # type: ignore[method-assign, assignment]

    def take_note(self, signum: int, frame: Any) -> None:
        """The handler: passes the signal on to processes that this one has started, and no more."""
        launcher = self.trainer.strategy.launcher
        if launcher is not None and not self.told:
            launcher.kill(signum)
        self.told = True

    def agree(self) -> None:
        """Lets Lightning know on all processes if one of them was told; a collective."""
        told = sum_over_ranks(torch.tensor(float(self.told), device=self.trainer.strategy.root_device))
        if told > 0:
            self.trainer._signal_connector.received_sigterm = True
