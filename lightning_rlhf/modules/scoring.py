"""Calling rewards: all processes stop where one of them fails, and none of them need wait idly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from lightning_rlhf.batches import Rollouts, Scores
from lightning_rlhf.modules.ranks import agree, most_over_ranks, take_over
from lightning_rlhf.rewards.combine import CombinedReward
from lightning_rlhf.rewards.model import RewardModel
from lightning_rlhf.rewards.threads import background
from lightning_rlhf.strategies.sharding import shard_classifier


def scored(
    reward: CombinedReward, rollouts: Rollouts, tokenizer: Any, meanwhile: Callable[[], None] | None = None
) -> tuple[Scores, int]:
    """Calls the rewards on this process's rows; a collective.

    Args:
        reward: All of them.
        rollouts: What was written.
        tokenizer: Of the policy.
        meanwhile: What this thread does while another one calls the rewards; by default it calls them itself.

    Returns:
        The scores, and the rows of the process that has most.

    Raises:
        Exception: What a reward raised here.
        RuntimeError: If one failed on another process.
    """
    device = rollouts.response_mask.device
    error: Exception | None = None
    scores = Scores(total=torch.zeros(len(rollouts), device=device, dtype=torch.float32))
    try:
        if meanwhile is None:
            scores = reward(rollouts, tokenizer)
        else:
            coming = background().submit(reward, rollouts, tokenizer)
            try:
                meanwhile()
            finally:
                wait([coming])
            scores = coming.result()
    except Exception as failure:
        error = failure
    return scores, agree(error, f"`reward` {reward.name!r}", len(rollouts), device)


def load_models(models: Sequence[RewardModel], trainer: Any) -> None:
    """Reads rewards that are networks, so that what is wrong with one is said before anything is written.

    Args:
        models: Of the rewards.
        trainer: Whose processes are to have the same network where it is an object; None if this one is alone.
    """
    for model in models:
        network = model.load().model
        if trainer is not None and not model.spec.is_named and not getattr(network, "is_quantized", False):
            take_over(network, trainer.strategy.root_device)  # an object need not be the same everywhere


def shard_models(models: Sequence[RewardModel], mesh: DeviceMesh, device: torch.device, in_background: bool) -> None:
    """Shards rewards that are networks; does nothing a second time.

    Args:
        models: Of the rewards, those that are to be sharded.
        mesh: Of one dimension.
        device: On which processes talk.
        in_background: Whether rewards work while something else does.

    Raises:
        ValueError: If they do: processes would come to their exchanges in different orders.
    """
    for model in models:
        if in_background:
            raise ValueError(
                f"`reward_in_background=True`: the reward model {model.name!r} is sharded, and processes would wait "
                "for each other for ever: leave it out, or pass `RewardModel(..., sharded=False)`."
            )
        if not model.is_adapter:  # or it lies in the policy's shards
            shard_classifier(model.load(), mesh)
        model.most = partial(most_over_ranks, device=device)
