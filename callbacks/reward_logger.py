"""Rewards in every logger: statistics and histograms of each."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlhf.batches import Experience
from lightning_rlhf.callbacks.due import DueCallback
from lightning_rlhf.modules.ranks import gather_objects, gather_over_ranks

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""What stands for a histogram where a logger has none."""


MANY_GROUPS = 100
"""More groups than this are probably a mistake: a curve for each."""

Group = tuple[str, str]
"""A reward's name and a value of the metadata."""


class RewardLogger(DueCallback):
    """Logs the distribution of every reward, over the responses of all processes.

    Means are logged anyway; this adds ``reward/<name>/std``, ``/min``, ``/max``, and a histogram of the scores:
    ``reward/<name>/histogram`` in TensorBoard and W&B, the quantiles ``reward/<name>/q05`` to ``q95`` in loggers that
    draw none. ``total`` is the weighted sum.

    Args:
        every_n_iterations: How often.
        group_by: A key of the prompts' rows, such as the task they are of: the mean of each reward is also logged for
            every value of it that occurs, as ``reward/<name>/<key>/<value>``.

    Example:
        >>> RewardLogger(every_n_iterations=10, group_by="task").every_n_iterations
        10
    """

    def __init__(self, every_n_iterations: int = 1, group_by: str | None = None) -> None:
        super().__init__(every_n_iterations)
        self.group_by = group_by
        self._warned = False

    def on_experience(self, trainer: L.Trainer, module: Any, experience: Experience) -> None:
        """Called once an iteration, when scores are there and before the updates; a collective."""
        if not self.is_due(module) or not trainer.loggers:
            return
        scores_by_name = {"total": experience.scores.total, **experience.scores.by_name}
        for name, scores in scores_by_name.items():
            everywhere = gather_rows(scores, module.rows_of_largest)
            everywhere = everywhere[~everywhere.isnan()].double().cpu()
            if trainer.is_global_zero and len(everywhere):
                for logger in trainer.loggers:
                    log_distribution(logger, f"reward/{name}", everywhere, module.iteration)
        if self.group_by is not None:
            self._log_groups(trainer, scores_by_name, experience.metadata, module.iteration)

    def _log_groups(
        self, trainer: L.Trainer, scores_by_name: dict[str, Tensor], metadata: dict[str, list[Any]], iteration: int
    ) -> None:
        values = metadata.get(str(self.group_by))
        of_ranks = gather_objects(None if values is None else group_sums(scores_by_name, values))
        if any(sums is None for sums in of_ranks):
            raise ValueError(f"`group_by={self.group_by!r}` is no key of the prompts' rows: {sorted(metadata)} are.")
        means = group_means(of_ranks)
        if len(means) > MANY_GROUPS * len(scores_by_name) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"`group_by={self.group_by!r}` has more than {MANY_GROUPS} values in an iteration, each of which gets "
                "a curve: choose a key with few."
            )
        if trainer.is_global_zero:
            metrics = {f"reward/{name}/{self.group_by}/{value}": mean for (name, value), mean in means.items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=iteration)


def group_sums(scores_by_name: dict[str, Tensor], values: list[Any]) -> dict[Group, tuple[float, int]]:
    """What the responses of each group scored together.

    Args:
        scores_by_name: (batch,) each, NaN where a reward did not apply.
        values: Of the metadata by which they are grouped, (batch,).

    Returns:
        Sum and count of the scores, by reward and group.
    """
    sums: dict[Group, tuple[float, int]] = {}
    for name, scores in scores_by_name.items():
        for value, score in zip(values, scores.tolist(), strict=True):
            if not math.isnan(score):
                total, count = sums.get((name, str(value)), (0.0, 0))
                sums[name, str(value)] = (total + score, count + 1)
    return sums


def group_means(of_ranks: list[dict[Group, tuple[float, int]]]) -> dict[Group, float]:
    """Means over the responses of all processes.

    Args:
        of_ranks: Sums and counts of each process, whose groups may differ.

    Returns:
        The mean score, by reward and group, in order.

    Example:
        >>> group_means([{("cats", "short"): (3.0, 1)}, {("cats", "short"): (0.0, 2)}])
        {('cats', 'short'): 1.0}
    """
    groups = sorted({group for sums in of_ranks for group in sums})
    both = {group: [sums[group] for sums in of_ranks if group in sums] for group in groups}
    return {group: sum(total for total, _ in parts) / sum(count for _, count in parts) for group, parts in both.items()}


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
