"""Reinforcement learning from human feedback for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rlhf.data.conversations import ConversationDataModule
    from lightning_rlhf.data.judged import RewardedDataModule, UnpairedPreferenceDataModule
    from lightning_rlhf.data.preferences import PreferenceDataModule
    from lightning_rlhf.data.prompts import PromptDataModule
    from lightning_rlhf.data.steps import StepDataModule
    from lightning_rlhf.generation.sampling import Sampling
    from lightning_rlhf.models.loading import ModelSpec
    from lightning_rlhf.modules.grpo import GRPOModule
    from lightning_rlhf.modules.ppo import PPOModule
    from lightning_rlhf.modules.process_reward import ProcessRewardModule
    from lightning_rlhf.modules.reward import RewardModule
    from lightning_rlhf.modules.sft import SFTModule
    from lightning_rlhf.rewards.dense import DenseReward
    from lightning_rlhf.rewards.ensemble import RewardEnsemble
    from lightning_rlhf.rewards.http import HTTPReward
    from lightning_rlhf.rewards.model import RewardModel
    from lightning_rlhf.rewards.penalties import LengthPenalty, RepetitionPenalty
    from lightning_rlhf.rewards.rules import ExactMatch, RegexMatch, TagFormat

__version__ = "0.1.0"

_HOMES = {
    "ConversationDataModule": "lightning_rlhf.data.conversations",
    "DenseReward": "lightning_rlhf.rewards.dense",
    "ExactMatch": "lightning_rlhf.rewards.rules",
    "GRPOModule": "lightning_rlhf.modules.grpo",
    "HTTPReward": "lightning_rlhf.rewards.http",
    "LengthPenalty": "lightning_rlhf.rewards.penalties",
    "ModelSpec": "lightning_rlhf.models.loading",
    "PPOModule": "lightning_rlhf.modules.ppo",
    "PreferenceDataModule": "lightning_rlhf.data.preferences",
    "ProcessRewardModule": "lightning_rlhf.modules.process_reward",
    "PromptDataModule": "lightning_rlhf.data.prompts",
    "RegexMatch": "lightning_rlhf.rewards.rules",
    "RepetitionPenalty": "lightning_rlhf.rewards.penalties",
    "RewardEnsemble": "lightning_rlhf.rewards.ensemble",
    "RewardModel": "lightning_rlhf.rewards.model",
    "RewardModule": "lightning_rlhf.modules.reward",
    "RewardedDataModule": "lightning_rlhf.data.judged",
    "SFTModule": "lightning_rlhf.modules.sft",
    "Sampling": "lightning_rlhf.generation.sampling",
    "StepDataModule": "lightning_rlhf.data.steps",
    "TagFormat": "lightning_rlhf.rewards.rules",
    "UnpairedPreferenceDataModule": "lightning_rlhf.data.judged",
}

__all__ = [
    "ConversationDataModule",
    "DenseReward",
    "ExactMatch",
    "GRPOModule",
    "HTTPReward",
    "LengthPenalty",
    "ModelSpec",
    "PPOModule",
    "PreferenceDataModule",
    "ProcessRewardModule",
    "PromptDataModule",
    "RegexMatch",
    "RepetitionPenalty",
    "RewardEnsemble",
    "RewardModel",
    "RewardModule",
    "RewardedDataModule",
    "SFTModule",
    "Sampling",
    "StepDataModule",
    "TagFormat",
    "UnpairedPreferenceDataModule",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
