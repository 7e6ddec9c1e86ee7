"""Statistics over an iteration, reduced like losses: sums over counts, over all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.functional.masked import mean_and_variance, moments
from lightning_rlhf.modules.ranks import gather_objects, sum_over_ranks


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (``ddof=1``) of a quantity, over all that was added on all processes."""

    mean: float
    std: float


class Meter:
    """Counts, sums and sums of squares under names; all processes must use the same ones, or :meth:`fill`."""

    def __init__(self) -> None:
        self._moments: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Adds numbers to a quantity.

        Args:
            name: As it is logged.
            values: Of any shape.
            mask: True where one counts; all do by default.
        """
        added = moments(values, mask)
        self._moments[name] = self._moments[name] + added if name in self._moments else added

    def fill(self, device: torch.device) -> None:
        """Adds nothing under every name that another process has and this one lacks; a collective.

        Args:
            device: On which processes talk.
        """
        for name in {name for names in gather_objects(sorted(self._moments)) for name in names} - set(self._moments):
            self._moments[name] = torch.zeros(3, dtype=torch.float64, device=device)

    def reduce(self) -> dict[str, Statistic]:
        """What was added on all processes since the last call, in one collective.

        Returns:
            The statistics, by name; a quantity of which there was nothing has none.
        """
        names = sorted(self._moments)
        if not names:
            return {}
        found = [self._moments[name] for name in names]
        # Seconds are counted in host memory, rewards on a GPU.
        device = next((moment.device for moment in found if not moment.is_cpu), torch.device("cpu"))
        sums = sum_over_ranks(torch.stack([moment.to(device) for moment in found]))
        self._moments.clear()
        means, variances = mean_and_variance(sums, ddof=1)
        columns = zip(names, sums[:, 0].tolist(), means.tolist(), variances.sqrt().tolist(), strict=True)
        return {name: Statistic(mean, std) for name, count, mean, std in columns if count > 0}
