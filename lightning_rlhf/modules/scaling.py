"""Scores, normalised, penalised, clipped and scaled before an algorithm learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rlhf.batches import Rollouts, Scores
from lightning_rlhf.functional.advantages import token_rewards
from lightning_rlhf.functional.masked import mean_and_variance, moments
from lightning_rlhf.modules.ranks import sum_over_ranks
from lightning_rlhf.rewards.combine import weighted_sum

RewardScaling = Literal["running", "first"]
"""By which standard deviation scores are divided: of all so far, or of the first iteration's."""


class ScoreScaler:
    """Normalises rewards one by one, takes a penalty off their sum, clips, then divides by a standard deviation.

    A reward that is normalised has mean 0 and standard deviation 1 over all that it gave so far, these scores included,
    on all processes; then it is weighed. Of dense scores the sum over the response counts: they are divided alike, and
    the mean is taken off on the last token. Of the sum of all rewards the mean is never taken off.

    Args:
        clip: How far from 0 a score may be; each of a response's dense scores alike. None does not clip.
        scaling: ``"running"`` divides by the standard deviation (``ddof=1``) of all clipped scores so far, these
            included; ``"first"`` by that of the first iteration; None does not divide. Of dense scores the sum over the
            response counts.
        missing_eos_penalty: Taken off the score of a response that was cut off.
        weights: Of every reward, by name; read where one is normalised.
        normalize: Names of the rewards to normalise, or True for all.
    """

    def __init__(
        self,
        clip: float | None = None,
        scaling: RewardScaling | None = None,
        missing_eos_penalty: float | None = None,
        weights: Mapping[str, float] | None = None,
        normalize: bool | Sequence[str] = False,
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"`reward_clip={clip}` must be positive, or None to clip nothing.")
        if scaling not in (None, "running", "first"):
            raise ValueError(f"`reward_scaling={scaling!r}` must be 'running', 'first' or None.")
        self.clip = clip
        self.scaling = scaling
        self.weights = dict(weights or {})
        names = list(self.weights if normalize is True else normalize or ())
        unknown = [name for name in names if name not in self.weights]
        if unknown:
            raise ValueError(
                f"`normalize_rewards` names {unknown[0]!r}, which is none of the rewards: {', '.join(self.weights)}."
            )
        self.missing_eos_penalty = missing_eos_penalty
        self.moments = torch.zeros(3, dtype=torch.float64)  # of clipped scores: count, sum, sum of squares
        self.moments_by_name = {name: torch.zeros(3, dtype=torch.float64) for name in sorted(set(names))}

    def __call__(self, scores: Scores, rollouts: Rollouts) -> Scores:
        """What the algorithm learns from; a collective where it scales.

        Args:
            scores: As the rewards gave them.
            rollouts: What they are of.

        Returns:
            New scores; ``by_name`` stays as it was.
        """
        mask = rollouts.sampled_mask
        if self.moments_by_name:
            total, tokens = self._normalized(scores, mask)
        else:
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
        return _mean_and_scale(self.moments)[1]

    def _normalized(self, scores: Scores, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of rewards of which some are normalised, whole and per token; a collective."""
        names = list(self.moments_by_name)
        added = torch.stack([moments(scores.by_name[name], ~scores.by_name[name].isnan()) for name in names])
        for name, of_reward in zip(names, sum_over_ranks(added).cpu(), strict=True):
            self.moments_by_name[name] = self.moments_by_name[name] + of_reward
        by_name, tokens_by_name = dict(scores.by_name), dict(scores.tokens_by_name)
        for name in names:
            mean, scale = _mean_and_scale(self.moments_by_name[name])
            by_name[name] = ((by_name[name].double() - mean) / scale).to(scores.total.dtype)
            if name in tokens_by_name:
                shift = torch.full_like(scores.total, mean / scale)
                tokens_by_name[name] = tokens_by_name[name] / scale - token_rewards(shift, None, mask)
        return weighted_sum(by_name, tokens_by_name, self.weights, mask)

    def state_dict(self) -> dict[str, Any]:
        """The moments so far, of the sum and of every reward that is normalised."""
        by_name = {name: of_reward.tolist() for name, of_reward in self.moments_by_name.items()}
        return {"moments": self.moments.tolist(), "by_name": by_name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from saved moments."""
        self.moments = torch.tensor(state["moments"], dtype=torch.float64)
        for name, of_reward in state["by_name"].items():
            if name in self.moments_by_name:
                self.moments_by_name[name] = torch.tensor(of_reward, dtype=torch.float64)


def _mean_and_scale(moments: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (``ddof=1``); equal scores have none, since what their moments leave is rounding."""
    mean, variance = mean_and_variance(moments, ddof=1)
    return float(mean), float(variance.sqrt()) if variance > 1e-12 * mean.square() else 1.0
