"""The networks of a run, without their weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_rlhf.models.activations import fuse_activations
from lightning_rlhf.models.adapter_configs import changes_model
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.dropout import disable_dropout
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.freezing import freeze_weights
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.loading import ModelSpec, check_folder
from lightning_rlhf.models.outline import adapted, outlined, outlined_classifier, rounded_weights, runnable
from lightning_rlhf.models.recomputation import recompute_activations
from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.online import OnlineModule
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.rewards.model import RewardModel


@dataclass
class Network:
    """A language model.

    Attributes:
        decoder: Whose tensors have no numbers.
        rounded: Bytes of weights that are held in fewer bits, by ``id``; in passes they are plain ones.
        value_head: On its last states, if it has one.
    """

    decoder: Decoder
    rounded: dict[int, int] = field(default_factory=dict)
    value_head: nn.Module | None = None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Its modules, under the names of their parameter groups."""
        return {"policy": self.decoder} | ({} if self.value_head is None else {"value": self.value_head})

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return [tensor for part in self.parts.values() for tensor in (*part.parameters(), *part.buffers())]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters; one that two parts share is there once."""
        return list({id(p): p for part in self.parts.values() for p in part.parameters()}.values())

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.parameters if p.requires_grad]

    @property
    def blocks(self) -> list[nn.Module]:
        """What is sharded by itself."""
        decoder = self.decoder
        names = decoder.encoder_blocks + (() if decoder.blocks is None else decoder.blocks.blocks)
        return [decoder.model.get_submodule(name) for name in names]

    @property
    def outside(self) -> list[nn.Parameter]:
        """The parameters that lie in no block."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        return [p for p in self.parameters if id(p) not in inside]

    def bytes(self, placement: Placement) -> int:
        """Memory that it takes on a device, its value head left out.

        Args:
            placement: Of the run.
        """
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in self.decoder.buffers())
        return placement.bytes_of(self.decoder.parameters(), self.rounded) + buffers


@dataclass
class Classifier:
    """A reward model.

    Attributes:
        reward: Whose network it is.
        model: Whose tensors have no numbers.
        bytes: That it takes on every device.
    """

    reward: RewardModel
    model: Any
    bytes: int


@dataclass
class Networks:
    """All networks of a run.

    Attributes:
        mode: In which they were made, and in which they must be run.
        policy: What trains.
        reference: A network of its own that the policy is compared with; None where it shares the policy's.
        reference_bytes: What the reference holds of its own, per device.
        form: What the reference is, in a few words.
        rewards: Classifiers on the policy's device.
    """

    mode: FakeTensorMode
    policy: Network
    reference: Network | None
    reference_bytes: int
    form: str
    rewards: list[Classifier]

    @classmethod
    def of(cls, module: RLHFModule, placement: Placement) -> Networks:
        """Those that a module would build.

        Args:
            module: That has not built them.
            placement: Of its run.

        Returns:
            The networks.

        Raises:
            ValueError: If the module would refuse its arguments too, or a config cannot be read.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        spec = module.spec
        if spec.quantization is not None and spec.adapter is None and spec.num_layers_unfrozen != 0:
            raise ValueError(
                f"`quantization={spec.quantization!r}` leaves the policy nothing to train, since rounded weights have "
                "no gradient: give it an `adapter`, or `num_layers_unfrozen=0` for a value head alone."
            )
        if spec.quantization is not None and placement.is_sharded:
            raise ValueError(
                f"`quantization={spec.quantization!r}` cannot be sharded, since bitsandbytes knows no shards: leave it "
                "out, or use `strategy: ddp`, where every process holds the whole model."
            )
        policy = outline(mode, spec, module.disable_dropout)
        with mode:
            freeze_weights(policy.decoder, spec.num_layers_unfrozen)
            if module.with_value_head:
                policy.value_head = ValueHead(policy.decoder.width)
        reference, taken, form = _reference(mode, module, policy, placement)
        return cls(mode, policy, reference, taken, form, _rewards(mode, module))

    def compute_in(self, placement: Placement) -> None:
        """Gives the networks the types in which they compute; how they are held is then no longer to be seen.

        Args:
            placement: Of the run.
        """
        for network in (self.policy, self.reference):
            for parameter in [] if network is None else network.parameters:
                parameter.data = parameter.data.to(placement.gathered(placement.held(parameter.dtype)))


def outline(mode: FakeTensorMode, spec: ModelSpec, without_dropout: bool, argument: str = "policy") -> Network:
    """A language model as a module would load it, adapter and all.

    Args:
        mode: In which it is made.
        spec: Of the model.
        without_dropout: Whether dropout is 0.
        argument: What the user calls it, for errors.

    Returns:
        The network.
    """
    model = outlined(spec, argument)
    weights = dict(model.named_parameters())
    rounded = {id(weights[name]): size for name, size in rounded_weights(spec, outlined).items()}
    for weight in weights.values():
        weight.requires_grad_(id(weight) not in rounded)
    adapters = adapted(model, spec)
    if spec.gradient_checkpointing:
        recompute_activations(model)
    fuse_activations(model)
    if without_dropout:
        disable_dropout(model)
    tensors = runnable(model, mode)
    with mode, torch.no_grad():
        decoder = decoder_of(model)
        decoder.adapters = adapters
        decoder.find_blocks()
    return Network(decoder, {id(tensors[number]): size for number, size in rounded.items()})


def _reference(
    mode: FakeTensorMode, module: RLHFModule, policy: Network, placement: Placement
) -> tuple[Network | None, int, str]:
    """What the module would take for its reference, by the rules by which it does."""
    if not isinstance(module, OnlineModule) or module.kl_coef == 0:
        return None, 0, ""
    decoder, spec = policy.decoder, module.reference_spec
    trained = placement.bytes_of(p for p in decoder.parameters() if p.requires_grad)
    if spec is None and decoder.adapters is not None:
        if decoder.adapters.was_trained or changes_model(decoder.adapters.config):
            return None, trained, "a copy of the adapter"
        return None, 0, "the adapter off"
    if spec is None:
        if decoder.model.get_input_embeddings().weight.requires_grad:  # as reference_of has it
            return None, policy.bytes(placement), "a full copy"
        return None, trained + _copied_buffers(decoder), "copies of what trains"
    if decoder.adapters is not None and spec.has_model_of(module.spec):
        if spec.adapter is None and not changes_model(decoder.adapters.config):
            return None, 0, "the adapter off"
        if isinstance(spec.adapter, str | os.PathLike):
            check_folder(os.fspath(spec.adapter), "reference.adapter")
            return None, trained, "an adapter of its own"
    network = outline(mode, spec, module.disable_dropout, "reference")
    return network, network.bytes(placement), "a network of its own"


def _copied_buffers(decoder: Decoder) -> int:
    """Bytes of the buffers in the modules that train, which are copied with them."""
    assert decoder.blocks is not None
    modules = [decoder.model.get_submodule(name) for name in decoder.blocks.blocks + decoder.blocks.after]
    copied = [module for module in modules if any(p.requires_grad for p in module.parameters())]
    return sum(buffer.numel() * buffer.element_size() for module in copied for buffer in module.buffers())


def _rewards(mode: FakeTensorMode, module: RLHFModule) -> list[Classifier]:
    """The classifiers among the rewards that go where the policy is; each device has them whole."""
    if not isinstance(module, OnlineModule):
        return []
    found: list[Classifier] = []
    for reward in module.reward.models:
        if reward.device is not None:
            continue
        model = outlined_classifier(reward.spec)
        rounded = rounded_weights(reward.spec, outlined_classifier)
        tensors = {name: tensor.numel() * tensor.element_size() for name, tensor in model.named_parameters()}
        tensors |= {name: tensor.numel() * tensor.element_size() for name, tensor in model.named_buffers()}
        runnable(model, mode)
        found.append(Classifier(reward, model, sum({**tensors, **rounded}.values())))
    return found
