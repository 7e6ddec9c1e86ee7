"""Scores, penalised, clipped and scaled before an algorithm learns from them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rlhf.batches import Rollouts, Scores
from lightning_rlhf.functional.advantages import token_rewards
from lightning_rlhf.functional.masked import mean_and_variance, moments
from lightning_rlhf.modules.ranks import sum_over_ranks

RewardScaling = Literal["running", "first"]
"""By which standard deviation scores are divided: of all so far, or of the first iteration's."""


class ScoreScaler:
    """Takes a penalty off, clips, then divides by a standard deviation; the mean is never taken off.

    Args:
        clip: How far from 0 a score may be; each of a response's dense scores alike. None does not clip.
        scaling: ``"running"`` divides by the standard deviation (``ddof=1``) of all clipped scores so far, these
            included; ``"first"`` by that of the first iteration; None does not divide. Of dense scores the sum over the
            response counts.
        missing_eos_penalty: Taken off the score of a response that was cut off.
    """

    def __init__(
        self, clip: float | None = None, scaling: RewardScaling | None = None, missing_eos_penalty: float | None = None
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"`reward_clip={clip}` must be positive, or None to clip nothing.")
        if scaling not in (None, "running", "first"):
            raise ValueError(f"`reward_scaling={scaling!r}` must be 'running', 'first' or None.")
        self.clip = clip
        self.scaling = scaling
        self.missing_eos_penalty = missing_eos_penalty
        self.moments = torch.zeros(3, dtype=torch.float64)  # of clipped scores: count, sum, sum of squares

    def __call__(self, scores: Scores, rollouts: Rollouts) -> Scores:
        """What the algorithm learns from; a collective where it scales.

        Args:
            scores: As the rewards gave them.
            rollouts: What they are of.

        Returns:
            New scores; ``by_name`` stays as it was.
        """
        mask = rollouts.sampled_mask
        total, tokens = scores.total, scores.token_scores
        if self.missing_eos_penalty is not None:
            penalty = self.missing_eos_penalty * rollouts.truncated.float()
            total = total - penalty
            tokens = None if tokens is None else tokens - token_rewards(penalty, None, mask)
        if self.clip is not None:
            total = total.clamp(-self.clip, self.clip)
            tokens = None if tokens is None else tokens.clamp(-self.clip, self.clip)
        if tokens is not None:
            total = tokens.sum(1)
        if self.scaling is not None:
            scale = self._scale(total)
            total, tokens = total / scale, None if tokens is None else tokens / scale
        return Scores(total=total, by_name=scores.by_name, token_scores=tokens)

    def _scale(self, total: Tensor) -> float:
        if self.scaling == "running" or self.moments[0] == 0:
            self.moments = self.moments + sum_over_ranks(moments(total)).cpu()
        mean, variance = mean_and_variance(self.moments, ddof=1)
        # Equal scores have no scale of their own: what their moments leave is rounding.
        return float(variance.sqrt()) if variance > 1e-12 * mean.square() else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The moments so far."""
        return {"moments": self.moments.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from saved moments."""
        self.moments = torch.tensor(state["moments"], dtype=torch.float64)
