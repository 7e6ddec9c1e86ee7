"""The reference of a policy with an adapter: the same model with the adapter off, or with another one on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lightning_rlhf.models.adapter_configs import changes_model
from lightning_rlhf.models.adapters import REFERENCE, Adapters
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.loading import ModelSpec, check_folder
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.reference import Reference


class AdapterReference(Reference):
    """A policy with its adapter switched off, or for another, for the call.

    It costs no second model. What it has of its own, a frozen adapter, lies in the policy's layers.

    Args:
        policy: Whose frozen weights it shares.
        adapter: What is on instead of the policy's adapter; None for nothing.
    """

    def __init__(self, policy: Policy, adapter: str | None) -> None:
        super().__init__(nn.Module(), is_named=True)
        self.policy = policy
        self.adapter = adapter

    @property
    def adapters(self) -> Adapters:
        """Of the policy."""
        adapters = self.policy.decoder.adapters
        assert adapters is not None
        return adapters

    @property
    def reader(self) -> Policy:
        """The policy, when its adapter is off."""
        return self.policy

    def in_place(self) -> AbstractContextManager[None]:
        """Switches."""
        return self.adapters.using(self.adapter)

    def weights(self) -> Mapping[str, Tensor]:
        """Those of the frozen adapter; the model's own are the policy's to check."""
        state = self.policy.decoder.model.state_dict() if self.adapter is not None else {}
        return {name: weight for name, weight in state.items() if f".{self.adapter}" in name}


def as_at_the_start(policy: Policy) -> AdapterReference:
    """The policy as it is now: its adapter off while that adds nothing, else a frozen copy of it.

    Args:
        policy: With an adapter, before it trains.

    Returns:
        The reference.
    """
    adapters = policy.decoder.adapters
    assert adapters is not None
    if not adapters.was_trained and _adds_nothing(policy.decoder):
        return AdapterReference(policy, None)
    adapters.hold(adapters.config, adapters.state(), REFERENCE)
    return AdapterReference(policy, REFERENCE)


def on_the_same_model(policy: Policy, spec: ModelSpec, reference: ModelSpec) -> AdapterReference | None:
    """A reference that was named and is the policy's own model, alone or with an adapter of its own.

    Args:
        policy: That it may share weights with.
        spec: From which the policy was loaded.
        reference: What was named.

    Returns:
        The reference; None where it must be loaded by itself.
    """
    adapters = policy.decoder.adapters
    if adapters is None or not reference.has_model_of(spec):
        return None
    if reference.adapter is None:
        return None if changes_model(adapters.config) else AdapterReference(policy, None)
    assert isinstance(reference.adapter, str | os.PathLike)
    check_folder(os.fspath(reference.adapter), "reference.adapter")
    can_be = adapters.add(reference.adapter, REFERENCE, trains=False)
    return AdapterReference(policy, REFERENCE) if can_be else None


@torch.no_grad()
def _adds_nothing(decoder: Decoder) -> bool:
    """Whether the adapter leaves logits as they are but for rounding."""
    assert decoder.adapters is not None
    tokens, mask = decoder.sample()
    was_training = decoder.training
    decoder.eval()
    try:
        logits = decoder(tokens, mask, keep=2).logits
        with decoder.adapters.using(None):
            alone = decoder(tokens, mask, keep=2).logits
    finally:
        decoder.train(was_training)
    return bool((logits - alone).abs().max() <= 1e-5 * alone.float().std())
