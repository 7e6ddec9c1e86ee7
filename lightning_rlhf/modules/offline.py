"""What modules share that learn from data at rest, by Lightning's automatic optimisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rlhf.chance import derived_seed
from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.ranks import rank, sum_over_ranks, world_size


class OfflineModule(RLHFModule):
    """A module whose ``training_step`` returns a *sum* of terms, which is divided by their count before the update.

    How many terms an optimizer step will see is not known when its first backward pass runs. So the gradients of sums
    are added up, over ``accumulate_grad_batches`` batches and all ranks, and divided once. No split of a batch changes
    the result, and every flag of the Trainer works; it clips after the division.
    """

    _window: Tensor  # count and sum of the terms since the last update
    _loss_name: str

    def begin_step(self, batch_idx: int) -> None:
        """Seeds what is random in a training step, so that a resumed run draws the same.

        Args:
            batch_idx: Of the step.
        """
        torch.manual_seed(derived_seed(self.seed, "noise", self.trainer.global_step, batch_idx, rank()))

    def summed(self, name: str, terms: Tensor, mask: Tensor) -> Tensor:
        """What ``training_step`` returns.

        Args:
            name: Under which the mean is logged when the optimizer steps.
            terms: Of the loss, of any shape.
            mask: True where a term counts.

        Returns:
            Their sum, times ``accumulate_grad_batches``, by which Lightning will divide.
        """
        total = torch.where(mask, terms, 0.0).sum()
        self._loss_name = name
        self._window = self._window + torch.stack([mask.sum(), total.detach()]).double().cpu()
        return total * self.trainer.accumulate_grad_batches

    def on_train_start(self) -> None:
        """Nothing has been added up yet."""
        super().on_train_start()
        self._window = torch.zeros(2, dtype=torch.float64)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turns the gradient of a sum into that of the mean over what all ranks added up."""
        count, total = sum_over_ranks(self._window.to(self.device)).tolist()
        # DDP and FSDP2 have divided by the number of ranks.
        scale = world_size() / max(count, 1.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self.log(self._loss_name, total / max(count, 1.0), prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        self._window = torch.zeros(2, dtype=torch.float64)

    def progress(self) -> float:
        """Updates done over updates planned."""
        planned = self.trainer.estimated_stepping_batches
        return min(1.0, self.trainer.global_step / planned) if 0 < planned < float("inf") else 0.0
