"""Reward models, learnt from comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.batches import PreferenceBatch
from lightning_rlhf.functional.preference import (
    bradley_terry,
    ordered_pairs,
    plackett_luce,
    rao_kupper_tie,
    squared_sum,
)
from lightning_rlhf.models.loading import ModelLike
from lightning_rlhf.modules.evaluation import expect
from lightning_rlhf.modules.meter import Statistic
from lightning_rlhf.modules.preference_metrics import PreferenceMetrics
from lightning_rlhf.modules.ranks import agree
from lightning_rlhf.modules.report import Report
from lightning_rlhf.modules.scored import ScoringModule


class RewardModule(ScoringModule):
    r"""A reward model: the score of a response to a prompt, learnt from which responses people preferred.

    .. math:: -\log \sigma\bigl(r(x, y_w) - r(x, y_l) - m\bigr)

    for a pair, where the margin :math:`m` is 0 unless the data has one (eq. 1 of `Training language models to follow
    instructions <https://arxiv.org/abs/2203.02155>`_, eq. 2 of `Llama 2 <https://arxiv.org/abs/2307.09288>`_). Rankings
    of more responses are learnt by Plackett's and Luce's likelihood, ties by Rao's and Kupper's. The mean is over the
    comparisons of an optimizer step, on all processes (`docs/algorithms/reward.md`).

    Args:
        model: What is given a scalar head: a name, folder, object, config or :class:`ModelSpec` of a language model or
            encoder, or of a reward model that is to learn on.
        label_smoothing: Share of the comparisons that are believed to be the wrong way round, :math:`\epsilon`.
        tie_threshold: Difference of scores below which two responses seem equally good, :math:`\eta`; data with ties
            needs one. Of two equally good responses a share of :math:`\tanh(\eta / 2)` ties.
        center_coef: Weight of the squared sum of a comparison's scores, which keeps them around 0.
        normalize: Whether the scores that an export gives have mean 0 and standard deviation 1 over the responses of
            the last validation. Without one they stay as they are.
        group_by: A key of the data's rows, for accuracy by its values.
        disable_dropout: Whether dropout is 0 while this module trains; exports have the original values.
        **kwargs: Passed to :class:`RLHFModule`: tokenizer, seed, optimizer and schedule, learning_rates (of ``"model"``
            and ``"head"``), compile.
    """

    learns_from = (PreferenceBatch, "PreferenceDataModule")

    def __init__(
        self,
        model: ModelLike,
        *,
        label_smoothing: float = 0.0,
        tie_threshold: float = 0.0,
        center_coef: float = 0.0,
        normalize: bool = True,
        group_by: str | None = None,
        disable_dropout: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("evaluation_sampling", None) is not None:
            raise TypeError("`evaluation_sampling` is no argument of RewardModule, which writes nothing: leave it out.")
        super().__init__(model, disable_dropout=disable_dropout, **kwargs)
        if not 0.0 <= label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing={label_smoothing}` must be at least 0, and less than one half.")
        for name, value in {"tie_threshold": tie_threshold, "center_coef": center_coef}.items():
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"`{name}={value}` must be finite, and not negative.")
        self.label_smoothing = label_smoothing
        self.tie_threshold = tie_threshold
        self.center_coef = center_coef
        self.normalize = normalize
        self.group_by = group_by
        self._pairs: dict[int, PreferenceMetrics] = {}  # by loader, of the evaluation that is under way

    # --- the objective --------------------------------------------------------------------------------------------

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The summed loss of a batch."""
        self.begin_step(batch_idx)
        terms = self.loss(self.policy(batch), batch)
        return self.summed("preference/loss", terms, torch.ones_like(terms, dtype=torch.bool))

    def loss(self, scores: Tensor, batch: PreferenceBatch) -> Tensor:
        """The negative log-likelihood of every comparison.

        Args:
            scores: (batch, responses).
            batch: What was compared.

        Returns:
            (batch,).

        Raises:
            ValueError: If there is a tie, and no threshold; on all processes, which without one is a collective.
        """
        is_there = batch.is_there
        is_pair = is_there.sum(1) == 2
        difference = scores[:, 0] - scores[:, 1]
        terms = bradley_terry(difference, batch.margins.to(scores) + self.tie_threshold, self.label_smoothing)
        is_tie = is_pair & (batch.ranks[:, 0] == batch.ranks[:, 1])
        if self.tie_threshold == 0.0:
            self._refuse_ties(int(is_tie.sum()))
        elif bool(is_tie.any()):
            terms = torch.where(is_tie, rao_kupper_tie(difference, self.tie_threshold), terms)
        if not bool(is_pair.all()):
            ranked = (1.0 - self.label_smoothing) * plackett_luce(scores, batch.ranks, is_there)
            if self.label_smoothing:
                ranked = ranked + self.label_smoothing * plackett_luce(scores, -batch.ranks, is_there)
            terms = torch.where(is_pair, terms, ranked)
        if self.center_coef:
            terms = terms + self.center_coef * squared_sum(scores, is_there)
        return terms

    def _refuse_ties(self, ties: int) -> None:
        """Raises on all processes if one of them sees ties, so that none waits for another; a collective."""
        error = None
        if ties:
            error = ValueError(
                f"`tie_threshold={self.tie_threshold}` says that no two responses tie, and {ties} of this batch do: "
                "set it, to 0.5 for instance, or leave ties out of the data."
            )
        agree(error, "the loss", 0, self.device)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, batch: PreferenceBatch, numbers: list[int], counts: Tensor, loader: int, report: Report) -> None:
        """The loss of every comparison, and whether the preferred responses score higher."""
        scores = self.policy(batch)
        report.add("preference/loss", self.loss(scores, batch), counts)
        counted = batch.is_there & counts[:, None]
        report.add("reward/mean", scores, counted)
        margins, rows = ordered_pairs(scores, batch.ranks, counted)
        report.add("preference/margin", margins)
        # What the probability of winning is, given that it is no tie.
        logits = bradley_terry(-margins, self.tie_threshold) - bradley_terry(margins, self.tie_threshold)
        groups = None if self.group_by is None else self._groups(batch)
        metrics = self._pairs.setdefault(loader, PreferenceMetrics(self.device))
        metrics.update(logits, None if groups is None else [groups[row] for row in rows.tolist()])

    def concluded(self, loader: int, statistics: Mapping[str, Statistic]) -> dict[str, float]:
        """Accuracy and calibration; takes note of the scores' mean and standard deviation."""
        scores = statistics["reward/mean"]
        if self.normalize and loader == 0 and not (self.trainer.testing or self.trainer.sanity_checking):
            self.mean, self.std = scores.mean, scores.std if scores.std > 0.0 else 1.0
        return self._pairs.pop(loader).compute()

    def on_validation_epoch_start(self) -> None:
        """Nothing has been measured yet."""
        super().on_validation_epoch_start()
        self._pairs = {}

    on_test_epoch_start = on_validation_epoch_start

    def _groups(self, batch: PreferenceBatch) -> list[Any]:
        if self.group_by not in batch.metadata:
            raise ValueError(
                f"`group_by={self.group_by!r}` is no key of the data, which has {sorted(batch.metadata)} beside the "
                "comparisons."
            )
        return batch.metadata[self.group_by]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores the responses of every comparison, mean and standard deviation taken off.

        Returns:
            A dict per row, without those that only fill up: what the data says of it, ``scores``, the responses that
            were judged better first, and ``row``, its number over all processes.
        """
        expect(batch, *self.learns_from, self, "predict_dataloaders", "scores")
        numbers, counts = self._next_rows(len(batch), self.trainer.predict_dataloaders, dataloader_idx)
        scores, is_there = self.normalized(self.policy(batch)), batch.is_there
        return [
            {
                **{key: values[i] for key, values in batch.metadata.items()},
                "scores": scores[i][is_there[i]].tolist(),
                "row": number,
            }
            for i, number in enumerate(numbers)
            if counts[i]
        ]
