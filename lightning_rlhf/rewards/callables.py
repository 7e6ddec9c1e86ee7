"""Rewards in the forms in which users name them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_rlhf.dotted import imported
from lightning_rlhf.models.classifier import is_classifier_object
from lightning_rlhf.rewards.endpoint import is_url
from lightning_rlhf.rewards.functions import Reward
from lightning_rlhf.rewards.http import HTTPReward
from lightning_rlhf.rewards.model import RewardModel

RewardLike = Sequence[tuple[Reward | str, float] | Reward | str] | Reward | str
"""A callable, its dotted name, a reward model (a folder, hub name or object), the URL of an endpoint, or a list of
these, each alone or as a pair with its weight. The command line writes a value as the first of these that takes it, and
a callable takes everything."""


def as_callable(reward: Any) -> Any:
    """A reward in the form in which it is called.

    Args:
        reward: A callable; its dotted name; ``{"class_path": ..., "init_args": ...}`` of one, as checkpoints keep it;
            a reward model's folder, hub name or object; or the URL of an endpoint.

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
    if is_url(reward):
        return HTTPReward(reward)
    if "/" in reward or os.sep in reward or "." not in reward:
        return RewardModel(reward)
    try:
        return imported(reward, "reward")
    except ValueError:
        if Path(reward).is_dir():
            return RewardModel(reward)
        raise
