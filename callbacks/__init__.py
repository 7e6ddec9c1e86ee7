"""Callbacks that watch and steer a run; the algorithms are right without them."""

from lightning_rlhf.callbacks.reward_logger import RewardLogger

__all__ = ["RewardLogger"]
