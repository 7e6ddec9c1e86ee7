"""What an online module is made of: policy, reference and reward models."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lightning_rlhf.models.adapter_reference import on_the_same_model
from lightning_rlhf.models.hydra import reference_of
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.models.reward_adapter import AdapterClassifier, on_the_policy
from lightning_rlhf.modules.evaluation import PromptEvaluation
from lightning_rlhf.modules.manual import ManualModule
from lightning_rlhf.modules.scoring import load_models, shard_models
from lightning_rlhf.rewards.model import RewardModel


class OnlineNetworks(PromptEvaluation, ManualModule):
    """Networks that make, judge and hold back what a policy learns from.

    Attributes:
        kl_coef: At 0 there is no reference.
        reference_spec: What the policy must not stray from; None for itself, as it was at the start.
        reward_in_background: Whether rewards work in a thread of their own.
        offload_frozen: Whether reference and reward models are in host memory while they are not asked.
    """

    kl_coef: float
    reference_spec: ModelSpec | None
    reward_in_background: bool
    offload_frozen: bool

    def build(self) -> None:
        """Makes the policy and, if one will be read, the reference; reads the reward models."""
        for model in self.reward.models:
            model.waits = self.offload_frozen and model.device is None and not model.is_adapter
        super().build()
        self._put_rewards_beside()
        if self.builds_for_all:
            load_models(self._sharded_rewards, None)
        else:
            load_models(self.reward.models, self._trainer)
        if self.kl_coef != 0:
            self.reference = self._reference()
            self.reference.waits = self.offload_frozen
        if self.offload_frozen:
            self._check_offloaded()

    def configure_model(self) -> None:
        """With reward models; remembers what a sharded checkpoint, which is read whole, would bring of others."""
        super().configure_model()
        if isinstance(self.policy, FSDPModule):
            for judge in self._judges_beside:
                judge.keep()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the reward models that this module was given, whichever the checkpoint's run had."""
        super().on_load_checkpoint(checkpoint)
        for judge in self._judges_beside:
            judge.put_back()

    def _reference(self) -> Reference:
        if self.reference_spec is None:
            return reference_of(self.policy, self.spec.is_named)
        shared = on_the_same_model(self.policy, self.spec, self.reference_spec)
        if shared is not None:
            return shared
        network = Policy(self.load_decoder(self.reference_spec), self.policy.temperature)
        return Reference(network, self.reference_spec.is_named)

    def _put_rewards_beside(self) -> None:
        """Reads rewards that are adapters on the policy's model."""
        for number, model in enumerate(self._reward_adapters):
            if model.device is not None:
                raise ValueError(
                    f"`device={str(model.device)!r}`: the reward model {model.name!r} is an adapter, which is where "
                    "the policy is: leave it out."
                )
            if self.reward_in_background:
                raise ValueError(
                    f"`reward_in_background=True`: the reward model {model.name!r} is an adapter on the policy's "
                    "model, with which the reference reads at the same time: leave it out, or export the reward model "
                    "whole."
                )
            folder = os.fspath(model.spec.model)
            model.load(on_the_policy(self.policy, self.spec, self.tokenizer, folder, model.tokenizer, number))

    def _check_offloaded(self) -> None:
        networks = [] if self.reference is None else [self.reference.network]
        networks += [model.load().model for model in self.reward.models if model.waits]
        if any(is_quantized(network) for network in networks):
            raise ValueError(
                "`offload_frozen=True` moves weights, and those of quantised layers stay where they were packed: leave "
                "it out, or quantise neither reference nor reward model."
            )

    @property
    def specs(self) -> list[ModelSpec]:
        """Of policy, reference and reward models."""
        reference = [] if self.reference_spec is None else [self.reference_spec]
        return [*super().specs, *reference, *(model.spec for model in self.reward.models)]

    @property
    def _reward_adapters(self) -> list[RewardModel]:
        return [model for model in self.reward.models if model.is_adapter]

    @property
    def _judges_beside(self) -> list[AdapterClassifier]:
        classifiers = (model.classifier for model in self.reward.models)
        return [classifier for classifier in classifiers if isinstance(classifier, AdapterClassifier)]

    @property
    def _sharded_rewards(self) -> list[RewardModel]:
        return [model for model in self.reward.models if model.shards or model.is_adapter]

    def built(self) -> dict[str, Any]:
        """With the reward models that are to be sharded, or lie in what is."""
        return {**super().built(), "rewards": [model.classifier for model in self._sharded_rewards]}

    def take(self, built: dict[str, Any]) -> None:
        """With these; the others are whole on every process."""
        super().take({name: value for name, value in built.items() if name != "rewards"})
        for model, classifier in zip(self._sharded_rewards, built["rewards"], strict=True):
            model.load(classifier)
        load_models([model for model in self.reward.models if model not in self._sharded_rewards], self.trainer)

    def shard(self, mesh: DeviceMesh) -> None:
        """With the reward models."""
        if self.offload_frozen:
            raise ValueError(
                "`offload_frozen=True`: sharded weights stay where they are: leave it out, or use "
                "`Trainer(strategy='ddp')`."
            )
        super().shard(mesh)
        device = self.trainer.strategy.root_device
        shard_models(self._sharded_rewards, mesh, device, self.reward_in_background)
