"""What says values, without its weights."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_rlhf.models.adapter_configs import adapter_config, begun_at_nothing
from lightning_rlhf.models.adapters import VALUE, Adapters
from lightning_rlhf.models.branches import ValueAdapter, ValueBranch, lower_blocks
from lightning_rlhf.models.critics import Critic, check_ranks, check_weights, is_classifier, score_of
from lightning_rlhf.models.freezing import freeze_weights
from lightning_rlhf.models.heads import HEADS
from lightning_rlhf.models.loading import check_folder
from lightning_rlhf.models.outline import outlined
from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.critics import ActorCriticModule
from lightning_rlhf.planning.outlines import Network, outline


def put_beside(module: RLHFModule, adapters: Adapters | None) -> bool:
    """Puts a critic's adapter beside the policy's, where the module would.

    Args:
        module: That has not built its networks.
        adapters: Of the policy, on torch's meta device.

    Returns:
        Whether it would.
    """
    if not isinstance(module, ActorCriticModule) or module.critic_spec is None:
        return False
    adapter = module.critic_spec.adapter
    if isinstance(adapter, str | os.PathLike):  # whose weights are not read
        check_folder(os.fspath(adapter), "critic.adapter")
        adapter = begun_at_nothing(adapter_config(adapter))
    return module.shares_model(adapters, adapter)


def add_values(mode: FakeTensorMode, module: RLHFModule, policy: Network) -> tuple[Network | None, str]:
    """Makes what says values, by the rules by which the module does.

    Args:
        mode: In which the policy was made.
        module: That has not built its networks.
        policy: As frozen as it will be, with the critic's adapter; changed in place.

    Returns:
        The critic where it is a model of its own, or None; and in a few words what says values.

    Raises:
        ValueError: If the module would refuse it too.
    """
    if not isinstance(module, ActorCriticModule):
        return None, ""
    decoder, layers = policy.decoder, module.num_value_layers_unfrozen
    if layers:
        policy.value = _branch(mode, module, policy)
        return None, f"copies of the policy's top {layers} blocks"
    if module.critic_spec is None:
        policy.value = _head(mode, module, decoder.width)
        return None, "a head on the policy's states"
    if decoder.adapters is not None and decoder.adapters.parameters(VALUE):
        policy.value = ValueAdapter(_head(mode, module, decoder.width))
        return None, "an adapter of its own on the policy's model"
    return _critic(mode, module), "a model of its own"


def _head(mode: FakeTensorMode, module: ActorCriticModule, width: int, is_scorer: bool = False) -> nn.Module:
    kind = "linear" if is_scorer else module.value_head or "mlp"
    with mode:
        return HEADS[kind](width)


def _branch(mode: FakeTensorMode, module: ActorCriticModule, policy: Network) -> ValueBranch:
    """Whether a pass can begin there is not tried, since there are no numbers to compare."""
    decoder = policy.decoder
    trunk = lower_blocks(decoder, module.num_value_layers_unfrozen)
    model = decoder.model
    if decoder.adapters is not None or policy.rounded:
        spec = replace(module.spec, adapter=None, quantization=None)
        model = outline(mode, spec, module.disable_dropout).decoder.model
    head = _head(mode, module, decoder.width)
    with mode, torch.no_grad(), trunk.learning_forms(decoder.model):
        decoder(*decoder.sample(), keep=1)
    trunk.needs_more = bool(trunk.more)
    with mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by `deepcopy`
        return ValueBranch(decoder, trunk, model, head)


def _critic(mode: FakeTensorMode, module: ActorCriticModule) -> Network:
    spec = module.critic_spec
    assert spec is not None
    check_weights(spec)
    score = None
    if not module.copies_policy and is_classifier(spec):
        score = score_of(outlined(spec, "critic", scores=True), module.value_head is None)
    network = outline(mode, spec, module.disable_dropout, "critic")
    freeze_weights(network.decoder, spec.num_layers_unfrozen)
    check_ranks(network.decoder)
    head = _head(mode, module, network.decoder.width, score is not None)
    with mode:
        Critic(network.decoder, head)  # which takes its own head off
    network.value = head
    return network
