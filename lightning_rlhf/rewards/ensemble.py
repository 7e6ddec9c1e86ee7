"""Several rewards that judge the same, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from lightning_rlhf.functional.ensemble import Combination, ensemble_score
from lightning_rlhf.rewards.callables import as_callable
from lightning_rlhf.rewards.functions import Reward
from lightning_rlhf.rewards.stored import StoredReward


class RewardEnsemble(StoredReward):
    r"""Rewards that judge the same, such as reward models of different seeds, whose scores become one.

    A policy that learns from one reward model finds what that overrates; of several it finds what all overrate (`Reward
    Model Ensembles Help Mitigate Overoptimization <https://arxiv.org/abs/2310.02743>`_). It is a reward beside others:
    it has one weight, and every member is logged under its own name as well. Where members are dense, their scores per
    token are combined token by token.

    Args:
        rewards: Two or more, each as an online module's ``reward`` may be.
        combine: ``"mean"``; ``"min"``, the worst case; ``"mean-std"`` or ``"mean-variance"``, the mean less ``coef``
            times how far the members disagree. The paper takes the variance.
        coef: Weight of the disagreement, :math:`\lambda`; read by the last two, which need one.
        name: Under which their common score is logged.

    Example:
        >>> RewardEnsemble(["runs/judge-0", "runs/judge-1", "runs/judge-2"], combine="mean-std", coef=0.5).name
        'ensemble'
    """

    name: str

    def __init__(
        self,
        rewards: Sequence[Reward | str],
        combine: Combination = "mean",
        coef: float | None = None,
        name: str = "ensemble",
    ) -> None:
        if isinstance(rewards, str) or not isinstance(rewards, Sequence) or len(rewards) < 2:
            raise ValueError(f"`rewards={rewards!r}` must be a list of two rewards or more.")
        if combine not in get_args(Combination):
            raise ValueError(f"`combine={combine!r}` must be one of {', '.join(map(repr, get_args(Combination)))}.")
        penalizes = combine in ("mean-std", "mean-variance")
        if penalizes and (coef is None or not 0.0 < coef < float("inf")):
            raise ValueError(
                f"`coef={coef}` must be more than 0 and finite: it weighs what `combine={combine!r}` takes off."
            )
        if not penalizes and coef is not None:
            raise ValueError(f"`coef={coef}` is read by nothing with `combine={combine!r}`: leave it out.")
        self.members = [as_callable(reward) for reward in rewards]
        for member in self.members:
            if isinstance(member, RewardEnsemble):
                raise TypeError(f"`rewards` holds the ensemble {member.name!r}: name its members instead.")
        self._given = {"rewards": list(rewards), "combine": combine, "coef": coef, "name": name}
        self.combine = combine
        self.coef = coef
        self.name = name

    def __call__(self, scores: Sequence[Tensor]) -> Tensor:
        """What the members say together.

        Args:
            scores: Of each, of one shape.

        Returns:
            Of that shape; NaN where no member applies.
        """
        return ensemble_score(torch.stack(list(scores)), self.combine, self.coef or 0.0)
