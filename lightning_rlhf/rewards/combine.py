"""Several rewards with weights, as one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.batches import Rollouts, Scores
from lightning_rlhf.dotted import imported
from lightning_rlhf.functional.advantages import token_rewards
from lightning_rlhf.models.classifier import is_classifier_object
from lightning_rlhf.rewards.functions import Reward, RewardFunction, as_tensor
from lightning_rlhf.rewards.model import RewardModel

RewardLike = Sequence[tuple[Reward | str, float] | Reward | str] | Reward | str
"""A callable, its dotted name, a reward model (a folder, hub name or object), or a list of these, each alone or as a
pair with its weight. The command line writes a value as the first of these that takes it, and a callable takes
everything."""

RESERVED_NAMES = ("mean", "std", "total")
"""What is logged under these names is the sum of all rewards."""


class CombinedReward:
    """The weighted sum of one or more rewards.

    Args:
        rewards: What :data:`RewardLike` allows.
    """

    def __init__(self, rewards: RewardLike) -> None:
        items = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
        if not items:
            raise ValueError("`reward=[]` names no reward: give at least one callable.")
        pairs = [item if isinstance(item, tuple | list) else (item, 1.0) for item in items]
        self.weights = [float(weight) for _, weight in pairs]
        self.rewards: list[RewardFunction] = []
        for reward, _ in pairs:
            function = RewardFunction(as_callable(reward))
            taken = {*RESERVED_NAMES, *(other.name for other in self.rewards)}
            number = 2
            name = function.name
            while name in taken:
                name, number = f"{function.name}_{number}", number + 1
            function.name = name
            self.rewards.append(function)

    def __call__(self, rollouts: Rollouts, tokenizer: Any) -> Scores:
        """Scores every response with every reward.

        Args:
            rollouts: What was written.
            tokenizer: Passed to rewards that ask for it.

        Returns:
            The scores.

        Raises:
            ValueError: If a reward returned what does not fit, or no reward applies to a response.
            RuntimeError: If a reward raised.
        """
        device, shape = rollouts.response_mask.device, rollouts.response_mask.shape
        for model in self.models:
            model.to(device)
        results = self._results(rollouts, tokenizer)
        by_name: dict[str, Tensor] = {}
        tokens_by_name: dict[str, Tensor] = {}
        for name, scores in results.items():
            if isinstance(scores[0], list):
                tokens_by_name[name] = torch.stack([_padded(row, shape[1], device) for row in scores])
                by_name[name] = tokens_by_name[name].sum(1)
            else:
                by_name[name] = as_tensor(scores, device)
        applies = ~torch.stack(list(by_name.values())).isnan().all(0)
        if not bool(applies.all()):
            i = int((~applies).nonzero()[0])
            raise ValueError(
                f"`reward` {self.name!r} gave None for response {i} ({rollouts.responses[i]!r}), and no other reward "
                "applies to it: one must."
            )
        total, token_scores = weighted_sum(by_name, tokens_by_name, self.weight_by_name, rollouts.sampled_mask)
        return Scores(total=total, by_name=by_name, token_scores=token_scores, tokens_by_name=tokens_by_name)

    def _results(self, rollouts: Rollouts, tokenizer: Any) -> dict[str, Any]:
        """What every reward says; models come last, since for one that is sharded processes wait for each other."""
        results: dict[str, Any] = {}
        waiting = self.models
        try:
            for reward in sorted(self.rewards, key=lambda reward: isinstance(reward.function, RewardModel)):
                if isinstance(reward.function, RewardModel):
                    waiting.pop(0)
                results[reward.name] = reward(rollouts, tokenizer)
        except Exception:  # whatever it is: it is raised again when nobody waits any more
            for model in waiting:
                model.give_up()
            raise
        return {reward.name: results[reward.name] for reward in self.rewards}

    def stand_by(self) -> None:
        """Takes part in what processes do together, where this one has nothing to score."""
        for model in self.models:
            model([], [])

    @property
    def weight_by_name(self) -> dict[str, float]:
        """The weight of every reward."""
        return {reward.name: weight for reward, weight in zip(self.rewards, self.weights, strict=True)}

    @property
    def models(self) -> list[RewardModel]:
        """Those of the rewards that are networks."""
        return [reward.function for reward in self.rewards if isinstance(reward.function, RewardModel)]

    @property
    def name(self) -> str:
        """The names of all rewards."""
        return ", ".join(reward.name for reward in self.rewards)


def weighted_sum(
    by_name: Mapping[str, Tensor], tokens_by_name: Mapping[str, Tensor], weights: Mapping[str, float], mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Adds rewards up; one counts nothing where it does not apply.

    Args:
        by_name: (batch,) of every reward, NaN where it does not apply.
        tokens_by_name: (batch, response) of every dense one, likewise.
        weights: Of every reward.
        mask: (batch, response), True where the policy chose a token.

    Returns:
        The sum, (batch,); and, where a reward is dense, the sum per token, (batch, response), in which the score of a
        whole response lies on the last token.
    """
    total = torch.zeros(len(mask), dtype=torch.float32, device=mask.device)
    per_token = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for name, weight in weights.items():
        score = by_name[name].nan_to_num(0.0)
        total = total + weight * score
        if tokens_by_name:
            dense = tokens_by_name.get(name)
            tokens = token_rewards(score, None, mask) if dense is None else dense.nan_to_num(0.0)
            per_token = per_token + weight * tokens
    return total, per_token if tokens_by_name else None


def as_callable(reward: Any) -> Any:
    """A reward in the form in which it is called.

    Args:
        reward: A callable; its dotted name; ``{"class_path": ..., "init_args": ...}`` of one, as checkpoints keep it;
            or a reward model's folder, hub name or object.

    Returns:
        A callable, or what is none as it is.

    Raises:
        ValueError: If a name names neither.
    """
    if isinstance(reward, Mapping) and "class_path" in reward:
        return imported(reward["class_path"], "reward")(**reward.get("init_args", {}))
    if isinstance(reward, os.PathLike) or is_classifier_object(reward):
        return RewardModel(reward)
    if not isinstance(reward, str):
        return reward
    if "/" in reward or os.sep in reward or "." not in reward:
        return RewardModel(reward)
    try:
        return imported(reward, "reward")
    except ValueError:
        if Path(reward).is_dir():
            return RewardModel(reward)
        raise


def _padded(scores: Any, length: int, device: torch.device) -> Tensor:
    return as_tensor([*scores, *[0.0] * (length - len(scores))], device)
