"""Calling rewards: all processes stop where one of them fails, and none of them need wait idly."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from lightning_rlhf.batches import Rollouts, Scores
from lightning_rlhf.modules.ranks import agree, take_over
from lightning_rlhf.rewards.combine import CombinedReward


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
            with ThreadPoolExecutor(1, "reward") as pool:
                coming = pool.submit(reward, rollouts, tokenizer)
                meanwhile()
            scores = coming.result()
    except Exception as failure:
        error = failure
    return scores, agree(error, f"`reward` {reward.name!r}", len(rollouts), device)


def load_models(reward: CombinedReward, trainer: Any) -> None:
    """Reads the rewards that are networks, so that what is wrong with one is said before anything is written.

    Args:
        reward: All rewards.
        trainer: Whose processes are to have the same network where it is an object; None outside of one.
    """
    for model in reward.models:
        network = model.load().model
        if trainer is not None and not model.spec.is_named and not getattr(network, "is_quantized", False):
            take_over(network, trainer.strategy.root_device)  # an object need not be the same everywhere
