"""The log-probs that an update begins from, where the sampler rounds differently from the pass that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.modules.report import Report


class SamplerCorrection:
    r"""Puts the log-probs of the pass that trains in the place of those that the sampler kept.

    In single precision the two differ by rounding, and nothing is gained. In half precision, or where the sampler's
    weights are quantised, a first ratio is not 1: learning is off-policy without anybody having meant it.
    ``policy/sampler_gap`` is logged in any case and says how far they are apart. Computing them anew costs a forward
    pass; the policy that wrote is then another than the one that learns, which `truncated importance sampling
    <https://openreview.net/forum?id=8MHqvb4lK9>`_ makes up for: every token's terms of the loss count

    .. math:: \min\left(\frac{\pi_\mathrm{train}(a_t | s_t)}{\pi_\mathrm{sampler}(a_t | s_t)}, C\right).

    Args:
        recomputes: Whether this is done.
        importance_cap: :math:`C`, such as 2; None weighs nothing.
    """

    def __init__(self, recomputes: bool, importance_cap: float | None) -> None:
        if importance_cap is not None and not importance_cap > 0:
            raise ValueError(f"`importance_cap={importance_cap}` must be positive, or None for no weights.")
        if importance_cap is not None and not recomputes:
            raise ValueError(
                f"`importance_cap={importance_cap}` compares the sampler with the pass that trains: set "
                "`recompute_logprobs=True` too."
            )
        self.recomputes = recomputes
        self.importance_cap = importance_cap

    def __call__(self, rollouts: Rollouts, logprobs: Tensor, report: Report) -> None:
        """Replaces ``old_logprobs``, sets ``importance``, and says how large they are.

        Args:
            rollouts: Changed in place.
            logprobs: (batch, response), of the pass that trains.
            report: Of the iteration.
        """
        mask = rollouts.sampled_mask
        log_ratio = torch.where(mask, logprobs - rollouts.old_logprobs, 0.0)
        report.add("policy/sampler_gap", log_ratio.abs(), mask)
        rollouts.old_logprobs = torch.where(mask, logprobs, rollouts.old_logprobs)
        rollouts.importance = torch.ones_like(log_ratio)
        if self.importance_cap is not None:
            rollouts.importance = log_ratio.exp().clamp(max=self.importance_cap)
            report.add("policy/importance", rollouts.importance, mask)
