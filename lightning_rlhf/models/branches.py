"""What says values within a policy and shares weights with it: copies of its top blocks, or an adapter of its own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from lightning_rlhf.models.activations import fuse_activations, fuse_norms
from lightning_rlhf.models.adapters import VALUE
from lightning_rlhf.models.blocks import swapped
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.encoder_decoder import EncoderDecoder
from lightning_rlhf.models.export import plain_model
from lightning_rlhf.models.freezing import can_begin_at
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reading import Reading
from lightning_rlhf.models.recomputation import recompute_activations
from lightning_rlhf.models.states import head_states
from lightning_rlhf.models.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SharedValues(nn.Module, ABC):
    """What says values with a pass of its own through a policy's modules.

    Args:
        value_head: Reads the states that the pass ends in.
    """

    def __init__(self, value_head: nn.Module) -> None:
        super().__init__()
        self.value_head = value_head

    def listening(self, decoder: Decoder, reading: Reading) -> AbstractContextManager[list[Tensor]]:
        """Listens for what the pass begins with, while the policy reads.

        Args:
            decoder: The policy's.
            reading: What it reads.

        Returns:
            A context with a list, which then holds it; here nothing that the policy makes of the tokens is of use.
        """
        return nullcontext([])

    def forward(self, decoder: Decoder, reading: Reading, heard: list[Tensor]) -> Float[Tensor, ...]:
        """Values, once the policy has read.

        Args:
            decoder: The policy's.
            reading: What it has read.
            heard: From :meth:`listening`.

        Returns:
            In the shape of the reading's targets.
        """
        return self.alone(decoder, reading)

    @abstractmethod
    def alone(self, decoder: Decoder, reading: Reading) -> Float[Tensor, ...]:
        """Values, from the tokens on, or from what frozen blocks made of them.

        Args:
            decoder: The policy's.
            reading: What is to be read.

        Returns:
            In the shape of the reading's targets.
        """


class ValueBranch(SharedValues):
    """Copies of a policy's top blocks and of what comes after them, which train and end in a value head.

    They read what the policy's own blocks in their places read, as in trlX; so gradients flow on into whatever trains
    below. The copies are plain weights: an adapter is merged into them, and what was quantised is not.

    Args:
        decoder: The policy's, as it starts.
        trunk: The policy's blocks below, from :func:`lower_blocks`; a pass can begin behind them.
        model: What is copied from: the decoder's, or the same with the adapter merged and nothing quantised.
        value_head: Reads the states that the copies end in.

    Attributes:
        names: Of the modules that the copies stand in for.
        copies: In that order.
    """

    def __init__(self, decoder: Decoder, trunk: Trunk, model: PreTrainedModel, value_head: nn.Module) -> None:
        super().__init__(value_head)
        assert decoder.blocks is not None
        self.trunk = trunk
        head = model.get_output_embeddings()
        top = decoder.blocks.top(len(decoder.blocks.blocks) - len(trunk.frozen))
        modules = {name: model.get_submodule(name) for name in top}
        modules = {name: module for name, module in modules.items() if module is not head and list(module.parameters())}
        self.names = list(modules)
        own = decoder.model.get_output_embeddings()
        self.copies = nn.ModuleList(copy.deepcopy(module, {id(head): own}) for module in modules.values())
        policys = {id(parameter) for parameter in decoder.model.parameters()}
        for parameter in self.copies.parameters():
            if id(parameter) not in policys:
                parameter.requires_grad_(parameter.is_floating_point())

    @classmethod
    def of(cls, decoder: Decoder, num_layers: int, value_head: nn.Module, recomputes: bool = False) -> ValueBranch:
        """Copies of a policy's top blocks, once it was tried that a pass can begin with them.

        Args:
            decoder: The policy's, as it starts.
            num_layers: How many blocks are copied.
            value_head: Reads the states that the copies end in.
            recomputes: Whether blocks hold only what they read.

        Returns:
            The branch.

        Raises:
            ValueError: If there are fewer blocks, they were not found, or a pass cannot begin in their middle.
        """
        trunk = lower_blocks(decoder, num_layers)
        if not can_begin_at(decoder, trunk):
            raise ValueError(
                f"`num_value_layers_unfrozen={num_layers}`: {type(decoder.model).__name__} cannot begin in its middle. "
                "Use 0 for a value head on the policy's states, or `critic='policy'`."
            )
        branch = cls(decoder, trunk, _plain(decoder, recomputes), value_head)
        branch.copies.to(decoder.model.get_output_embeddings().weight.device)
        return branch

    @contextmanager
    def listening(self, decoder: Decoder, reading: Reading) -> Iterator[list[Tensor]]:
        """Listens for what the policy's lower blocks make of the tokens.

        What an encoder makes of the prompts is then part of the reading, and made once.
        """
        source = reading.source
        if isinstance(decoder, EncoderDecoder) and source is not None and source.states is None:
            source.states = decoder.encode(source.tokens, source.mask)
        with self.trunk.watched(decoder.model) as heard:
            yield heard

    def forward(self, decoder: Decoder, reading: Reading, heard: list[Tensor]) -> Float[Tensor, ...]:
        """Values, behind what the policy's lower blocks made of the tokens."""
        with self.trunk.replaced(decoder.model, heard[-1]):
            return self.alone(decoder, replace(reading, trunk=None))

    def alone(self, decoder: Decoder, reading: Reading) -> Float[Tensor, ...]:
        """Values, from the tokens on."""
        with swapped(decoder.model, dict(zip(self.names, self.copies, strict=True))):
            return self.value_head(head_states(decoder, reading))


class ValueAdapter(SharedValues):
    """A second adapter in the policy's layers, beside the policy's own, and a value head behind it.

    The model's own weights are held once. The adapter's weights lie in the policy's layers.
    """

    def alone(self, decoder: Decoder, reading: Reading) -> Float[Tensor, ...]:
        """Values, with the adapter on."""
        assert decoder.adapters is not None
        with decoder.adapters.using(VALUE):
            return self.value_head(head_states(decoder, reading))


def lower_blocks(decoder: Decoder, num_layers: int) -> Trunk:
    """The blocks of a policy that a branch of its top blocks leaves alone.

    Args:
        decoder: The policy's.
        num_layers: How many blocks are copied.

    Returns:
        All others; whether a pass can begin behind them is not tried.

    Raises:
        ValueError: If there are fewer blocks, or they were not found.
    """
    name, blocks = type(decoder.model).__name__, decoder.blocks
    if blocks is None or num_layers > len(blocks.blocks):
        found = "no blocks were found in" if blocks is None else f"it is more than the {len(blocks.blocks)} blocks of"
        raise ValueError(
            f"`num_value_layers_unfrozen={num_layers}`: {found} {name}. Use fewer, 0 for a value head on the "
            "policy's states, or `critic='policy'`."
        )
    branch = len(blocks.blocks) - num_layers
    return Trunk(blocks.blocks[:branch], blocks.blocks[branch], trains=True)


def _plain(decoder: Decoder, recomputes: bool) -> PreTrainedModel:
    """A decoder's model, or one with the adapter in its weights and none of these quantised."""
    if decoder.adapters is not None:
        model = decoder.adapters.merged()
    elif is_quantized(decoder.model):
        model = plain_model(decoder.model, decoder.model.state_dict())
    else:
        return decoder.model
    from lightning_rlhf.models.linear import speed_up_linears  # imports transformers

    if recomputes:
        recompute_activations(model)
    fuse_activations(model)
    fuse_norms(model)
    speed_up_linears(model)
    return model
