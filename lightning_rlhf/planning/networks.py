"""The networks of a run, without their weights."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_rlhf.models.adapter_configs import changes_model
from lightning_rlhf.models.blocks import find_stacks
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.freezing import freeze_weights
from lightning_rlhf.models.loading import check_folder
from lightning_rlhf.models.outline import outlined, rounded_weights, runnable
from lightning_rlhf.models.reward_folder import RewardAdapter
from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.online import OnlineModule
from lightning_rlhf.modules.scored import ScoringModule
from lightning_rlhf.planning.gathering import at_once
from lightning_rlhf.planning.outlines import Network, outline
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.planning.values import add_values, put_beside
from lightning_rlhf.rewards.model import RewardModel


@dataclass
class Classifier:
    """A reward model.

    Attributes:
        reward: Whose network it is.
        model: Whose tensors have no numbers.
        bytes: That it takes on every device.
        gathered: Bytes that are whole beside its parts while it scores, where it is sharded.
    """

    reward: RewardModel
    model: Any
    bytes: int
    gathered: int

    @property
    def form(self) -> str:
        """How it is held, in a few words."""
        if self.reward.is_adapter:
            return "an adapter on the policy's model"
        return "a part on each device" if self.gathered else "whole on each device"


@dataclass
class Networks:
    """All networks of a run.

    Attributes:
        mode: In which they were made, and in which they must be run.
        policy: What trains, with what says values of its states.
        critic: A network of its own that says values, and trains too; None where the policy says them.
        values: What says values, in a few words.
        reference: A network of its own that the policy is compared with; None where it shares the policy's.
        reference_bytes: What the reference holds of its own, per device.
        form: What the reference is, in a few words.
        rewards: Classifiers on the policy's device.
    """

    mode: FakeTensorMode
    policy: Network
    critic: Network | None
    values: str
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
        _check(module, placement)
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
        policy = outline(mode, spec, module.disable_dropout, beside=functools.partial(put_beside, module))
        with mode:
            freeze_weights(policy.decoder, spec.num_layers_unfrozen)
        critic, values = add_values(mode, module, policy)
        reference, taken, form = _reference(mode, module, policy, placement)
        return cls(mode, policy, critic, values, reference, taken, form, _rewards(mode, module, placement))

    @property
    def learning(self) -> list[Network]:
        """Those that train."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What trains, and what does not beside it, under the names of their parameter groups."""
        value = list(self.policy.value_parameters)
        value += [] if self.critic is None else self.critic.parameters
        return {"policy": nn.ParameterList(self.policy.decoder_parameters), "value": nn.ParameterList(value)}

    def compute_in(self, placement: Placement) -> None:
        """Gives the networks the types in which they compute; how they are held is then no longer to be seen.

        Args:
            placement: Of the run.
        """
        for network in (*self.learning, self.reference):
            for parameter in [] if network is None else network.parameters:
                parameter.data = parameter.data.to(placement.exchanged(placement.held(parameter.dtype))[0])


def _reference(
    mode: FakeTensorMode, module: RLHFModule, policy: Network, placement: Placement
) -> tuple[Network | None, int, str]:
    """What the module would take for its reference, by the rules by which it does."""
    if not isinstance(module, OnlineModule) or module.kl_coef == 0:
        return None, 0, ""
    decoder, spec = policy.decoder, module.reference_spec
    trained = placement.bytes_of(p for p in policy.decoder_parameters if p.requires_grad)
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
    if module.offload_frozen and spec.quantization is not None:
        raise ValueError(
            f"`offload_frozen=True` moves weights, and those of `reference.quantization={spec.quantization!r}` stay "
            "where they were packed: leave one of them out."
        )
    return network, network.bytes(placement), "a network of its own"


def _copied_buffers(decoder: Decoder) -> int:
    """Bytes of the buffers in the modules that train, which are copied with them."""
    assert decoder.blocks is not None
    modules = [decoder.model.get_submodule(name) for name in decoder.blocks.blocks + decoder.blocks.after]
    copied = [module for module in modules if any(p.requires_grad for p in module.parameters())]
    return sum(buffer.numel() * buffer.element_size() for module in copied for buffer in module.buffers())


def _check(module: RLHFModule, placement: Placement) -> None:
    """Refuses what is not counted, and what the module would refuse once it knows the strategy."""
    if isinstance(module, ScoringModule):
        raise ValueError(
            f"`model={type(module).__name__}` cannot be planned: its network scores texts and writes none, and only "
            "language models are counted. Plan an `SFTModule` on the same model, which takes a little more."
        )
    if not isinstance(module, OnlineModule) or not placement.is_sharded:
        return
    if module.offload_frozen:
        raise ValueError(
            "`offload_frozen=True`: sharded weights stay where they are: leave it out, or use `strategy: ddp`."
        )
    if module.reward_in_background and (sharded := [reward.name for reward in module.reward.models if reward.shards]):
        raise ValueError(
            f"`reward_in_background=True`: the reward model {sharded[0]!r} is sharded, and processes would wait for "
            "each other for ever: leave it out, or pass `RewardModel(..., sharded=False)`."
        )


def _rewards(mode: FakeTensorMode, module: RLHFModule, placement: Placement) -> list[Classifier]:
    """The classifiers among the rewards that go where the policy is."""
    if not isinstance(module, OnlineModule):
        return []
    return [_classifier(mode, module, reward, placement) for reward in module.reward.models if reward.device is None]


def _classifier(mode: FakeTensorMode, module: OnlineModule, reward: RewardModel, placement: Placement) -> Classifier:
    """One of them, of which each device has a part if it is sharded; it keeps its own type."""
    if reward.is_adapter:
        model, own = outlined(module.spec, scores=True), RewardAdapter.read(os.fspath(reward.spec.model)).state
        runnable(model, mode)
        gathered = _gathered(mode, model) if placement.is_sharded else 0
        return Classifier(reward, model, placement.bytes_of(own.values()), gathered)
    spec, is_sharded = reward.spec, reward.shards and placement.is_sharded
    if spec.quantization is not None and (is_sharded or module.offload_frozen):
        raise ValueError(
            f"`quantization={spec.quantization!r}` of the reward model {reward.name!r}: its weights can be neither "
            "sharded nor moved. Leave it out, or pass `RewardModel(..., sharded=False)` and no `offload_frozen=True`."
        )
    model = outlined(spec, "reward", scores=True)
    rounded = rounded_weights(spec, scores=True)
    sizes = {name: _size(parameter, placement if is_sharded else None) for name, parameter in model.named_parameters()}
    sizes |= {name: _size(buffer) for name, buffer in model.named_buffers()}
    runnable(model, mode)
    gathered = _gathered(mode, model) if is_sharded else 0
    return Classifier(reward, model, sum({**sizes, **rounded}.values()), gathered)


def _size(tensor: Tensor, placement: Placement | None = None) -> int:
    shape = tensor.shape if placement is None else placement.part(tensor.shape)
    return torch.Size(shape).numel() * tensor.element_size()


def _gathered(mode: FakeTensorMode, model: Any) -> int:
    """What is whole of a sharded classifier while it scores."""

    def run() -> None:
        tokens = torch.zeros(1, 4, dtype=torch.long)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))

    with mode, torch.no_grad():
        blocks = [model.get_submodule(name) for name in find_stacks(model, run)]
    inside = {id(p) for block in blocks for p in block.parameters()}
    root = sum(_size(p) for p in model.parameters() if id(p) not in inside)
    return at_once(root, [sum(map(_size, block.parameters())) for block in blocks])
