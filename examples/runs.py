"""What the examples' runs have in common: a trainer that says little, imitation, and the curve of the reward."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_rlhf import ConversationDataModule, SFTModule

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Curve(Callback):
    """Remembers the mean reward of every iteration, and when it was over.

    Attributes:
        rewards: One an iteration.
        seconds: One an iteration, since the curve was made.
    """

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.seconds: list[float] = []
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Called when an iteration is over."""
        self.rewards.append(float(trainer.callback_metrics["reward/mean"]))
        self.seconds.append(time.perf_counter() - self._began)


def quiet_trainer(**flags: Any) -> L.Trainer:
    """A Trainer that says no more than its progress bar."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # between Lightning and torch
    flags = {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 1, **flags}
    return L.Trainer(accelerator="cpu", devices=1, **flags)


def imitate(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    folder: Path,
    seed: int,
    epochs: int,
    batch_size: int = 25,
    **flags: Any,
) -> None:
    """Trains a random network to write what it is shown, at a learning rate that falls from 1e-3 in a line.

    Args:
        config: Of the network.
        tokenizer: That goes with it.
        rows: A `prompt` and a `response` each.
        folder: Where the network is saved to.
        seed: Of weights, order and dropout.
        epochs: Passes over the rows.
        batch_size: Rows of an update.
        **flags: Of the Trainer.
    """
    module = SFTModule(
        config,
        tokenizer=tokenizer,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
        lr_scheduler="linear",
        seed=seed,
    )
    data = ConversationDataModule(rows, batch_size=batch_size, seed=seed)
    quiet_trainer(max_epochs=epochs, logger=False, **flags).fit(module, datamodule=data)
    module.save_pretrained(folder)


def plot(
    curves: Mapping[str, Sequence[float]],
    episodes: int,
    levels: Mapping[str, float],
    path: Path,
) -> None:
    """Draws curves of the mean reward, between lines that are known.

    Args:
        curves: By name; a number an iteration each.
        episodes: Of an iteration.
        levels: By name, best first.
        path: Of the PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, rewards in curves.items():
        axes.plot(range(1, len(rewards) + 1), rewards, marker="o", markersize=4, label=name)
    for (name, level), color in zip(levels.items(), ("tab:green", "tab:red"), strict=True):
        axes.axhline(level, linestyle="--", color=color, label=name)
    axes.set(xlabel=f"iteration ({episodes} episodes each)", ylabel="mean score of the episodes", ylim=(0.0, 1.05))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
