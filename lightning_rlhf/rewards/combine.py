"""Several rewards with weights, as one."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.batches import Rollouts, Scores
from lightning_rlhf.functional.advantages import token_rewards
from lightning_rlhf.rewards.callables import RewardLike, as_callable
from lightning_rlhf.rewards.ensemble import RewardEnsemble
from lightning_rlhf.rewards.functions import RewardFunction, as_tensor
from lightning_rlhf.rewards.model import RewardModel

RESERVED_NAMES = ("mean", "std", "total")
"""What is logged under these names is the sum of all rewards."""


class CombinedReward:
    """The weighted sum of one or more rewards.

    Args:
        rewards: What :data:`RewardLike` allows.

    Attributes:
        rewards: All that are called, members of ensembles included.
        ensembles: By name, each with the names of its members.
        weight_by_name: Of all that count in the sum.
    """

    def __init__(self, rewards: RewardLike) -> None:
        items = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
        if not items:
            raise ValueError("`reward=[]` names no reward: give at least one callable.")
        pairs = [item if isinstance(item, tuple | list) else (item, 1.0) for item in items]
        self.weights = [float(weight) for _, weight in pairs]
        self.rewards: list[RewardFunction] = []
        self.ensembles: dict[str, tuple[RewardEnsemble, list[str]]] = {}
        self.weight_by_name: dict[str, float] = {}
        for (reward, _), weight in zip(pairs, self.weights, strict=True):
            function = as_callable(reward)
            if isinstance(function, RewardEnsemble):
                members = [self._add(member) for member in function.members]
                name = self._free(function.name)
                self.ensembles[name] = (function, members)
            else:
                name = self._add(function)
            self.weight_by_name[name] = weight

    def _add(self, function: Any) -> str:
        """Takes up what is to be called; returns its name."""
        reward = RewardFunction(function)
        reward.name = self._free(reward.name)
        self.rewards.append(reward)
        return reward.name

    def _free(self, wanted: str) -> str:
        """A name that nothing has yet."""
        taken, name, number = {*RESERVED_NAMES, *self.names}, wanted, 2
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        return name

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
        for name, (ensemble, members) in self.ensembles.items():
            dense = [member for member in members if member in tokens_by_name]
            if dense and len(dense) < len(members):
                other = next(member for member in members if member not in dense)
                raise ValueError(
                    f"`rewards` of the ensemble {name!r} scored per token ({dense[0]!r}) and per response ({other!r}): "
                    "members must do the same."
                )
            if dense:
                tokens_by_name[name] = ensemble([tokens_by_name[member] for member in members])
                by_name[name] = tokens_by_name[name].sum(1)
            else:
                by_name[name] = ensemble([by_name[member] for member in members])
        applies = ~torch.stack([by_name[name] for name in self.weight_by_name]).isnan().all(0)
        if not bool(applies.all()):
            i = int((~applies).nonzero()[0])
            raise ValueError(
                f"`reward` {self.name!r} gave None for response {i} ({rollouts.responses[i]!r}), and no other reward "
                "applies to it: one must."
            )
        total, token_scores = weighted_sum(by_name, tokens_by_name, self.weight_by_name, rollouts.sampled_mask)
        return Scores(total=total, by_name=by_name, token_scores=token_scores, tokens_by_name=tokens_by_name)

    def _results(self, rollouts: Rollouts, tokenizer: Any) -> dict[str, Any]:
        """What every reward says; those that are awaited begin first and are waited for last.

        Models come after all others that are called here, since for one that is sharded processes wait for each other.
        """
        results: dict[str, Any] = {}
        coming: dict[str, Future[Any]] = {}
        waiting = self.models
        try:
            for reward in self.rewards:
                if reward.is_awaited:
                    coming[reward.name] = reward.call(rollouts, tokenizer)
            for reward in sorted(self.rewards, key=_turn):
                if isinstance(reward.function, RewardModel):
                    waiting.pop(0)
                results[reward.name] = reward(rollouts, tokenizer, coming.get(reward.name))
        except Exception:  # whatever it is: it is raised again when nobody waits any more
            for model in waiting:
                model.give_up()
            raise
        finally:
            for future in coming.values():
                future.cancel()
        return {reward.name: results[reward.name] for reward in self.rewards}

    def stand_by(self) -> None:
        """Takes part in what processes do together, where this one has nothing to score."""
        for model in self.models:
            model([], [])

    @property
    def names(self) -> list[str]:
        """Of all that is logged."""
        return [*(reward.name for reward in self.rewards), *self.ensembles]

    @property
    def models(self) -> list[RewardModel]:
        """Those of the rewards that are networks."""
        return [reward.function for reward in self.rewards if isinstance(reward.function, RewardModel)]

    @property
    def name(self) -> str:
        """The names of all rewards."""
        return ", ".join(self.weight_by_name)


def weighted_sum(
    by_name: Mapping[str, Tensor], tokens_by_name: Mapping[str, Tensor], weights: Mapping[str, float], mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Adds rewards up; one counts nothing where it does not apply.

    Args:
        by_name: (batch,) of every reward, NaN where it does not apply.
        tokens_by_name: (batch, response) of every dense one, likewise.
        weights: Of every reward that counts.
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


def _turn(reward: RewardFunction) -> int:
    return 2 if reward.is_awaited else int(isinstance(reward.function, RewardModel))


def _padded(scores: Any, length: int, device: torch.device) -> Tensor:
    return as_tensor([*scores, *[0.0] * (length - len(scores))], device)
