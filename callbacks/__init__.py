"""Callbacks that watch and steer a run; the algorithms are right without them."""

from lightning_rlhf.callbacks.kl_controller import KLController
from lightning_rlhf.callbacks.response_writer import ResponseWriter
from lightning_rlhf.callbacks.reward_logger import RewardLogger
from lightning_rlhf.callbacks.rollout_checkpoint import RolloutCheckpoint
from lightning_rlhf.callbacks.rollout_writer import RolloutWriter
from lightning_rlhf.callbacks.sample_table import SampleTable
from lightning_rlhf.callbacks.validation_samples import ValidationSamples

__all__ = [
    "KLController",
    "ResponseWriter",
    "RewardLogger",
    "RolloutCheckpoint",
    "RolloutWriter",
    "SampleTable",
    "ValidationSamples",
]
