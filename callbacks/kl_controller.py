"""What a nat of divergence costs, from iteration to iteration."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_rlhf.batches import Experience
from lightning_rlhf.modules.ranks import sum_over_ranks

MOST = 0.2
"""How far off the target a divergence is taken to be, at most, as a share of it."""


class KLController(Callback):
    r"""Steers ``module.kl_coef`` so that the policy stays about ``target`` nats from the reference.

    After every iteration of :math:`n` responses, on all processes,

    .. math:: \beta \leftarrow \beta \left(1 + \operatorname{clip}\left(\frac{\mathrm{KL}}{\mathrm{target}} - 1,
        -0.2, 0.2\right) \frac{n}{\mathrm{horizon}}\right),

    section 2.2 of `Fine-Tuning Language Models from Human Preferences <https://arxiv.org/abs/1909.08593>`_ with the
    step per response, as its authors' code and trlX have it. KL is the iteration's ``kl/sequence``: the log-ratio
    summed over a response, averaged over responses. The new coefficient is that of the next iteration. It is the
    module's, and saved with it, so this callback has no state of its own.

    Args:
        target: In nats a response. None leaves the coefficient as it is, and makes sure that there is one.
        horizon: In responses: the smaller, the faster. trlX's default.

    Raises:
        ValueError: If the module has no KL term.

    Example:
        >>> KLController(target=6.0).updated(0.1, kl=7.2, responses=1000)
        0.102
    """

    def __init__(self, target: float | None = None, horizon: int = 10_000) -> None:
        if target is not None and not 0 < target < float("inf"):
            raise ValueError(f"`target={target}` must be positive, in nats a response, or None for a fixed `kl_coef`.")
        if horizon < 1:
            raise ValueError(f"`horizon={horizon}` must be at least 1, in responses.")
        self.target = target
        self.horizon = horizon
        self._responses = 0  # of the present iteration, on all processes

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuses a module that has nothing to steer."""
        name = type(pl_module).__name__
        if stage == "fit" and not hasattr(pl_module, "kl_coef"):
            raise ValueError(f"`KLController` steers `kl_coef`, which {name} does not have: leave it out.")
        if stage == "fit" and not pl_module.kl_coef > 0:
            raise ValueError(
                f"`KLController` cannot steer `kl_coef={pl_module.kl_coef}`, at which {name} has no reference: begin "
                "above 0, or leave the callback out."
            )

    def on_experience(self, trainer: L.Trainer, module: Any, experience: Experience) -> None:
        """Counts the responses of all processes; a collective."""
        if self.target is not None:
            self._responses = int(sum_over_ranks(torch.tensor(len(experience), device=module.device)))
            if self.horizon <= MOST * self._responses:
                raise ValueError(
                    f"`horizon={self.horizon}` must be more than {MOST} times the {self._responses} responses of an "
                    "iteration, or `kl_coef` could fall to 0 at once."
                )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Sets the coefficient of the next iteration."""
        if self.target is not None:
            kl = float(trainer.callback_metrics["kl/sequence"])
            pl_module.kl_coef = self.updated(pl_module.kl_coef, kl, self._responses)

    def updated(self, kl_coef: float, kl: float, responses: int) -> float:
        """The next coefficient.

        Args:
            kl_coef: The present one.
            kl: What was measured, in nats a response.
            responses: On how many, on all processes.

        Returns:
            The coefficient, or the present one while it is fixed.
        """
        if self.target is None:
            return kl_coef
        error = min(max(kl / self.target - 1.0, -MOST), MOST)
        return kl_coef * (1.0 + error * responses / self.horizon)
