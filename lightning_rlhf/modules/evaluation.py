"""Validation, test and prediction: how well a policy writes, and what."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_rlhf.batches import Batch, PromptBatch, Rollouts, Scores
from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.evaluation import is_filler
from lightning_rlhf.data.prompts import as_prompt_batch
from lightning_rlhf.generation.sampling import Sampling, SamplingChanges
from lightning_rlhf.modules.meter import Statistic
from lightning_rlhf.modules.ranks import agree, rank, world_size
from lightning_rlhf.modules.report import Report
from lightning_rlhf.modules.text import TextModule
from lightning_rlhf.rewards.combine import CombinedReward
from lightning_rlhf.rewards.metrics import MetricFunction


def expect(batch: Any, kind: type[Batch], source: str, module: Any, loaders: str, verb: str) -> None:
    """Refuses what a module cannot read.

    Args:
        batch: What came.
        kind: What should have.
        source: The DataModule that yields it.
        module: That reads it.
        loaders: The argument that it may have come from.
        verb: What the module does with it.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(batch, kind):
        raise TypeError(
            f"`{loaders}` or `datamodule` yields {type(batch).__name__}, and {type(module).__name__} {verb} "
            f"{kind.__name__}: use {source}, or a loader that yields the same."
        )


class EvaluatedModule(TextModule):
    """A policy that is measured on rows that it does not learn from, and that writes predictions.

    What is measured is a sum over a count, over all rows of all processes; rows that only fill up a process's share
    count nothing. Chance depends on the seed, the loader and the row alone, so that two evaluations differ by what was
    learnt between them.

    Attributes:
        learns_from: What a batch is, and which DataModule yields it.
        sampling_changes: What differs from ``sampling`` when it is evaluated or predicts.
    """

    learns_from: tuple[type[Batch], str]
    sampling_changes: SamplingChanges

    def __init__(self) -> None:
        super().__init__()
        self._reports: dict[int, Report] = {}  # by loader, of the evaluation that is under way
        self._rows_read: dict[int, int] = {}  # of this process, likewise

    @property
    def evaluation_sampling(self) -> Sampling:
        """How responses are drawn for evaluation and prediction."""
        return self.sampling.but(self.sampling_changes, "evaluation_sampling")

    @abstractmethod
    def evaluate(self, batch: Any, numbers: list[int], counts: Tensor, loader: int, report: Report) -> None:
        """Measures a batch.

        Args:
            batch: Rows of this process.
            numbers: Of its rows, counted over all processes.
            counts: (batch,), False for a row that only fills up.
            loader: Number of the loader.
            report: What is measured is added to.
        """

    def concluded(self, loader: int, statistics: Mapping[str, Statistic]) -> dict[str, float]:
        """What else is logged of a loader once all of it was measured; the same on all processes.

        Args:
            loader: Its number.
            statistics: Of what was measured, by name.

        Returns:
            Numbers by name.
        """
        return {}

    def log_evaluation(self, metrics: dict[str, float]) -> None:
        """Logs what was measured; the same on all processes.

        Args:
            metrics: By the names that are logged.
        """
        self.log_dict(metrics, prog_bar=True, sync_dist=True, add_dataloader_idx=False, batch_size=1)

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Makes tokens of prompts that come as text, from a loader that knows nothing of this module."""
        reads_prompts = self.learns_from[0] is PromptBatch or self.trainer.predicting
        has_encoder = self.policy.decoder.has_encoder
        return as_prompt_batch(batch, self.tokenizer, has_encoder) if reads_prompts else batch

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures a batch."""
        self._measure(batch, dataloader_idx, "val_dataloaders")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures a batch."""
        self._measure(batch, dataloader_idx, "test_dataloaders")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Writes a response to every prompt.

        Returns:
            A dict per row, without those that only fill up: what the data says of it, ``prompt``, ``response``, and
            ``row``, its number over all processes.
        """
        expect(batch, PromptBatch, "PromptDataModule", self, "predict_dataloaders", "writes responses to")
        numbers, counts = self._next_rows(len(batch), self.trainer.predict_dataloaders, dataloader_idx)
        rollouts = self.written(batch, numbers, dataloader_idx)
        return [
            {
                **{key: values[i] for key, values in batch.metadata.items()},
                "prompt": batch.prompts[i],
                "response": rollouts.responses[i],
                "row": number,
            }
            for i, number in enumerate(numbers)
            if counts[i]
        ]

    def on_validation_epoch_start(self) -> None:
        """Nothing has been measured yet."""
        self._reports, self._rows_read = {}, {}

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Logs under ``val/``."""
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        """Logs under ``test/``."""
        self._conclude("test")

    # --- one evaluation -----------------------------------------------------------------------------------------

    def written(self, prompts: PromptBatch, numbers: list[int], loader: int) -> Rollouts:
        """Writes a response to every prompt, as evaluation draws them.

        Args:
            prompts: Of this process.
            numbers: Of its rows, counted over all processes.
            loader: Number of the loader.

        Returns:
            What was written.
        """
        sampling = self.evaluation_sampling
        uniforms = row_uniforms(self.seed, "evaluate", (loader,), numbers, sampling.max_new_tokens)
        return self.respond(prompts, uniforms, sampling)

    def _measure(self, batch: Any, loader: int, argument: str) -> None:
        kind, source = self.learns_from
        expect(batch, kind, source, self, argument, "is measured on")
        numbers, counts = self._next_rows(len(batch), getattr(self.trainer, argument), loader)
        self.evaluate(batch, numbers, counts.to(self.device), loader, self._reports.setdefault(loader, Report()))

    def _next_rows(self, rows: int, loaders: Any, loader: int) -> tuple[list[int], Tensor]:
        """Numbers of the rows that this process reads next, and which of them count."""
        start = self._rows_read.get(loader, 0)
        self._rows_read[loader] = start + rows
        loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
        source = loaders[loader] if isinstance(loaders, list | tuple) else loaders
        numbers = [j * world_size() + rank() for j in range(start, start + rows)]
        return numbers, torch.tensor([not is_filler(source, number) for number in numbers])

    def _conclude(self, prefix: str) -> None:
        metrics: dict[str, float] = {}
        for loader, report in sorted(self._reports.items()):
            suffix = f"/dataloader_idx_{loader}" if len(self._reports) > 1 else ""
            report.fill(self.device)
            statistics = report.reduce()
            metrics |= {f"{prefix}/{name}{suffix}": statistic.mean for name, statistic in statistics.items()}
            if "reward/mean" in statistics:
                metrics[f"{prefix}/reward/std{suffix}"] = statistics["reward/mean"].std
            more = self.concluded(loader, statistics)
            metrics |= {f"{prefix}/{name}{suffix}": value for name, value in more.items()}
        self._reports = {}
        if metrics:
            self.log_evaluation(metrics)


class PromptEvaluation(EvaluatedModule):
    """Evaluation by what the policy writes to prompts: rewards, and what the user measures.

    Attributes:
        reward: What scores responses.
        metric_fn: What else is measured of them.
        iteration: The x axis.
    """

    reward: CombinedReward
    metric_fn: MetricFunction | None
    iteration: int

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        module = super()._apply(fn, recurse)
        reward = self.__dict__.get("reward")
        for model in () if reward is None else reward.models:  # it keeps its type, but goes where the policy goes
            model.to(self.device)
        return module

    def evaluate(self, batch: PromptBatch, numbers: list[int], counts: Tensor, loader: int, report: Report) -> None:
        """Writes, scores and measures. If a reward or metric fails anywhere, all processes stop."""
        rollouts = self.written(batch, numbers, loader).select(counts.nonzero().squeeze(1))
        nothing = torch.zeros(len(rollouts), dtype=torch.float32, device=self.device)
        scores = Scores(total=nothing, by_name=dict.fromkeys(self.reward.names, nothing))
        metrics: dict[str, list[float]] = {}
        error: Exception | None = None
        try:
            if len(rollouts):
                scores = self.reward(rollouts, self.tokenizer)
                metrics = {} if self.metric_fn is None else self._metrics(self.metric_fn, rollouts)
            else:
                self.reward.stand_by()
        except Exception as failure:
            error = failure
        agree(error, f"`reward` {self.reward.name!r} or `metric_fn`", len(rollouts), self.device)
        report.observe_scored(rollouts, scores, self.special_tokens.eos)
        for name, values in metrics.items():
            numbers_of_rows = torch.tensor(values, dtype=torch.float64, device=self.device)
            report.add(name, numbers_of_rows, ~numbers_of_rows.isnan())

    def _metrics(self, metric_fn: MetricFunction, rollouts: Rollouts) -> dict[str, list[float]]:
        metrics = metric_fn(rollouts, self.tokenizer)
        for name in metrics:
            if name.split("/")[0] in ("reward", "response", "policy"):
                raise ValueError(
                    f"`metric_fn` {metric_fn.name!r} returned {name!r}, which is logged anyway: take another name."
                )
        return metrics

    def log_evaluation(self, metrics: dict[str, float]) -> None:
        """Logs over the iteration: within training to every logger at once, alone through what Lightning prints."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            # Lightning takes a metric of this name for the x axis.
            super().log_evaluation({**metrics, "step": float(self.iteration)})
            return
        loggers: list[Any] = [] if self.trainer.sanity_checking else self.trainer.loggers
        for logger in loggers:
            logger.log_metrics(metrics, step=self.iteration)
        flags: dict[str, Any] = {"logger": False, "sync_dist": True, "add_dataloader_idx": False, "batch_size": 1}
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name.startswith("val/reward/mean"), **flags)
