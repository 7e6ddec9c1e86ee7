"""How well scores tell which of two responses was preferred, and how well they know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_rlhf.modules.ranks import gather_objects


class PreferenceAccuracy(Metric):
    """The share of pairs in which the preferred response scores higher; equal scores are right by half."""

    correct: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("correct", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, " pairs"]) -> None:
        """Adds pairs.

        Args:
            logits: Of the preferred response being the better one: the difference of two scores.
        """
        self.correct = self.correct + (0.5 * logits.detach().sign() + 0.5).double().sum()
        self.count = self.count + len(logits)

    def compute(self) -> Tensor:
        """The accuracy; NaN where there was no pair."""
        return self.correct / self.count


class CalibrationError(Metric):
    r"""By how much the confidence in an answer differs from how often it is right, over all pairs.

    .. math:: \sum_b \frac{n_b}{n} \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert

    The expected calibration error, eq. 3 of `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, with bins of equal width. Confidence is the probability of the likelier
    answer, so that the bins below one half are empty.

    Args:
        num_bins: Between 0 and 1.
        **kwargs: Of ``torchmetrics.Metric``.
    """

    bins: Tensor  # of each: pairs, the sum of their confidences, how many were right

    def __init__(self, num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("bins", torch.zeros(num_bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, " pairs"]) -> None:
        """Adds pairs.

        Args:
            logits: Of the preferred response being the better one: the difference of two scores.
        """
        logits = logits.detach().double()
        confidence = logits.abs().sigmoid()
        numbers = torch.stack([torch.ones_like(logits), confidence, 0.5 * logits.sign() + 0.5], dim=1)
        number = (confidence * len(self.bins)).ceil().long().clamp(1, len(self.bins)) - 1  # of NaN too
        self.bins = self.bins.index_add(0, number, numbers)

    def compute(self) -> Tensor:
        """The error; NaN where there was no pair."""
        count, confidence, correct = self.bins.unbind(1)
        return (correct - confidence).abs().sum() / count.sum()


class PreferenceMetrics:
    """What is measured of the pairs of a loader.

    Args:
        device: Where the pairs are.
        prefix: Of the names under which numbers are logged.
    """

    def __init__(self, device: torch.device, prefix: str = "preference") -> None:
        self.prefix = prefix
        self.device = device
        self.calibration = self._begun(CalibrationError())
        self.accuracy = self._begun(PreferenceAccuracy())
        self.groups: dict[str, PreferenceAccuracy] = {}

    def update(self, logits: Tensor, groups: Sequence[Any] | None = None) -> None:
        """Adds pairs.

        Args:
            logits: (pairs,), the preferred response's score less the other's.
            groups: What each pair belongs to.
        """
        self.calibration.update(logits)
        self.accuracy.update(logits)
        names = [] if groups is None else [str(group) for group in groups]
        for name in sorted(set(names)):
            chosen = torch.tensor([other == name for other in names], device=logits.device)
            self._group(name).update(logits[chosen])

    def compute(self) -> dict[str, float]:
        """What was measured on all processes; a collective."""
        names = sorted({name for names in gather_objects(sorted(self.groups)) for name in names})
        metrics: dict[str, Metric] = {"accuracy": self.accuracy, "calibration_error": self.calibration}
        metrics |= {f"accuracy/{name}": self._group(name) for name in names}
        numbers = {name: float(metric.compute()) for name, metric in metrics.items()}
        return {f"{self.prefix}/{name}": number for name, number in numbers.items() if number == number}

    def _group(self, name: str) -> PreferenceAccuracy:
        if name not in self.groups:
            self.groups[name] = self._begun(PreferenceAccuracy())
        return self.groups[name]

    def _begun(self, metric: Metric) -> Any:
        """A metric that does not mind, as torchmetrics does, that nothing may have been added here."""
        metric.to(self.device).update(torch.zeros(0, device=self.device))
        return metric
