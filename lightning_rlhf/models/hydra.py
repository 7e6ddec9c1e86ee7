"""The reference of a policy whose lower blocks are frozen: copies of what trains, on the trunk that both share."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_rlhf.models.adapter_reference import as_at_the_start
from lightning_rlhf.models.blocks import swapped
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.reference import Reference


class FrozenTop(nn.Module):
    """Copies of the modules of a decoder that train, as they are now; frozen parameters in them stay shared.

    Args:
        decoder: After :meth:`Decoder.freeze`.

    Attributes:
        names: Of the modules that the copies stand in for.
        copies: In that order.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        assert decoder.blocks is not None
        modules = {name: decoder.model.get_submodule(name) for name in decoder.blocks.blocks + decoder.blocks.after}
        frozen = {id(p): p for p in decoder.model.parameters() if not p.requires_grad}
        self.names = [name for name, module in modules.items() if any(p.requires_grad for p in module.parameters())]
        self.copies = nn.ModuleList(copy.deepcopy(modules[name], dict(frozen)) for name in self.names)
        self.requires_grad_(False).eval()

    def stands_in(self, decoder: Decoder) -> bool:
        """Tries whether, with the copies in their places, a decoder says the same and nothing that trains is asked.

        Args:
            decoder: From which they were copied.

        Returns:
            Whether the decoder can be split.
        """
        tokens, mask = decoder.sample()
        was_training = decoder.training
        decoder.eval()
        try:
            with torch.no_grad():
                plain = decoder(tokens, mask, keep=2).logits
            with torch.enable_grad(), swapped(decoder.model, dict(zip(self.names, self.copies, strict=True))):
                logits = decoder(tokens, mask, keep=2).logits
        finally:
            decoder.train(was_training)
        return torch.equal(logits, plain) and not logits.requires_grad


class HydraReference(Reference):
    """A policy with copies of its top modules, as they were at the start, swapped in for the call.

    It costs the memory of what trains, not of a second model, and follows the policy wherever that goes.

    Args:
        policy: Whose frozen lower blocks it shares.
        top: The copies.
        is_named: Whether a name or folder says where the weights come from; if not, they are part of its state.
    """

    network: FrozenTop

    def __init__(self, policy: Policy, top: FrozenTop, is_named: bool) -> None:
        super().__init__(top, is_named)
        self.policy = policy

    @property
    def reader(self) -> Policy:
        """The policy, when the copies are in it."""
        return self.policy

    def in_place(self) -> AbstractContextManager[None]:
        """Swaps the copies in."""
        copies = dict(zip(self.network.names, self.network.copies, strict=True))
        return swapped(self.policy.decoder.model, copies)


def reference_of(policy: Policy, is_named: bool) -> Reference:
    """What a policy must not stray from: itself, as it is now.

    Args:
        policy: Frozen in part or not.
        is_named: Whether a name or folder says where its weights come from.

    Returns:
        With an adapter, the model without it or with a copy of it. Copies of what trains where the trunk is frozen and
        can be shared. Else a full copy.
    """
    decoder = policy.decoder
    if decoder.adapters is not None:
        return as_at_the_start(policy)
    if decoder.model.get_input_embeddings().weight.requires_grad:  # which is frozen before anything else is
        return Reference.copied_from(policy, is_named)
    top = FrozenTop(decoder)
    if top.stands_in(decoder):
        return HydraReference(policy, top, is_named)
    rank_zero_warn(
        f"{type(decoder.model).__name__} cannot be split into a frozen trunk and what trains: the reference is a full "
        "copy of it."
    )
    return Reference.copied_from(policy, is_named)
