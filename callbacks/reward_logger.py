"""Rewards in every logger: statistics and histograms of each."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lightning_rlhf.batches import Experience
from lightning_rlhf.modules.ranks import gather_over_ranks

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""What stands for a histogram where a logger has none."""


class RewardLogger(Callback):
    """Logs the distribution of every reward, over the responses of all processes.

    Means are logged anyway; this adds ``reward/<name>/std``, ``/min``, ``/max``, and a histogram of the scores:
    ``reward/<name>/histogram`` in TensorBoard and W&B, the quantiles ``reward/<name>/q05`` to ``q95`` in loggers that
    draw none. ``total`` is the weighted sum.

    Args:
        every_n_iterations: How often.

    Example:
        >>> RewardLogger(every_n_iterations=10).every_n_iterations
        10
    """

    def __init__(self, every_n_iterations: int = 1) -> None:
        if every_n_iterations < 1:
            raise ValueError(f"`every_n_iterations={every_n_iterations}` must be at least 1.")
        self.every_n_iterations = every_n_iterations

    def on_experience(self, trainer: L.Trainer, module: Any, experience: Experience) -> None:
        """Called once an iteration, when scores are there and before the updates."""
        if module.iteration % self.every_n_iterations or not trainer.loggers:
            return
        for name, scores in {"total": experience.scores.total, **experience.scores.by_name}.items():
            everywhere = gather_rows(scores, module.rows_of_largest)
            everywhere = everywhere[~everywhere.isnan()].double().cpu()
            if trainer.is_global_zero and len(everywhere):
                for logger in trainer.loggers:
                    log_distribution(logger, f"reward/{name}", everywhere, module.iteration)


def gather_rows(scores: Tensor, most: int) -> Tensor:
    """Scores of all processes, which may have different numbers of them; a collective.

    Args:
        scores: (batch,), of this process.
        most: Rows of the process that has most.

    Returns:
        One after the other, NaN where a process had fewer.
    """
    rows = torch.full((most,), float("nan"), dtype=scores.dtype, device=scores.device)
    rows[: len(scores)] = scores
    return gather_over_ranks(rows).flatten()


def log_distribution(logger: Logger, name: str, values: Tensor, step: int) -> None:
    """Logs how numbers are distributed, in the way that a logger has for it.

    Args:
        logger: Any of Lightning's.
        name: The prefix of what is logged.
        values: The numbers.
        step: The x axis.
    """
    metrics = {
        f"{name}/std": float(values.std()) if len(values) > 1 else 0.0,
        f"{name}/min": float(values.min()),
        f"{name}/max": float(values.max()),
    }
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(f"{name}/histogram", values, step)
    elif type(logger).__name__ == "WandbLogger":
        import wandb  # it is there if its logger is

        experiment: Any = logger.experiment  # type: ignore[attr-defined]
        experiment.log({f"{name}/histogram": wandb.Histogram(values.tolist())}, commit=False)
    else:
        quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
        metrics |= {f"{name}/q{round(100 * q):02}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
    logger.log_metrics(metrics, step=step)
