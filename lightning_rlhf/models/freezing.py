"""Lower blocks that stay as they are, and what they make of tokens, which can then be kept."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.outputs import same_logits
from lightning_rlhf.models.trunk import Trunk


def freeze(decoder: Decoder, num_layers_unfrozen: int) -> None:
    """Leaves the top blocks to train, as :func:`freeze_weights` does, and keeps the work of what lies below them.

    Args:
        decoder: Changed in place.
        num_layers_unfrozen: As there.
    """
    freeze_weights(decoder, num_layers_unfrozen)
    _keep_frozen_blocks(decoder)


def freeze_weights(decoder: Decoder, num_layers_unfrozen: int) -> None:
    """Leaves the top blocks and what comes after them to train, less the embeddings, and nothing else.

    Args:
        decoder: Changed in place.
        num_layers_unfrozen: How many blocks; 0 freezes the whole model, -1 leaves it as it is.

    Raises:
        ValueError: If there are fewer blocks, or they were not found.
    """
    if num_layers_unfrozen == -1:
        return
    name = type(decoder.model).__name__
    if decoder.blocks is None:
        raise ValueError(
            f"`num_layers_unfrozen={num_layers_unfrozen}`: the blocks of {name} were not found, so that only -1 "
            "(everything trains) is possible."
        )
    if num_layers_unfrozen > len(decoder.blocks.blocks):
        raise ValueError(
            f"`num_layers_unfrozen={num_layers_unfrozen}` is more than the {len(decoder.blocks.blocks)} blocks of "
            f"{name}: use -1 if everything is to train."
        )
    decoder.model.requires_grad_(False)
    embedding = decoder.model.get_input_embeddings().weight
    for top in decoder.blocks.top(num_layers_unfrozen) if num_layers_unfrozen else ():
        for parameter in decoder.model.get_submodule(top).parameters():
            parameter.requires_grad_(parameter is not embedding and parameter.is_floating_point())


def _keep_frozen_blocks(decoder: Decoder) -> None:
    """Keeps the work of what lies below the lowest block that trains: frozen blocks, and a frozen encoder."""
    if decoder.has_encoder and any(parameter.requires_grad for parameter in decoder.model.get_encoder().parameters()):
        return
    blocks = () if decoder.blocks is None else decoder.blocks.blocks
    for branch, block in enumerate(blocks):
        if any(parameter.requires_grad for parameter in decoder.model.get_submodule(block).parameters()):
            if branch > 0 or decoder.has_encoder:
                _keep_trunk(decoder, Trunk(blocks[:branch], block))
            return


def _keep_trunk(decoder: Decoder, trunk: Trunk) -> None:
    """Tries on padded rows whether a pass may begin with kept states of some of them."""
    tokens, mask = decoder.sample()
    tokens, mask = torch.cat([tokens, tokens.flip(1)]), torch.cat([mask, mask])
    mask[0, 0] = not decoder.pads
    was_training = decoder.training
    decoder.eval()
    try:
        with trunk.learning_forms(decoder.model), torch.no_grad():
            decoder(tokens, mask, keep=2)
        decoder.trunk = trunk
        keeps = _begins_in_its_middle(decoder, tokens, mask)
        if not keeps and trunk.more:
            trunk.needs_more = True
            keeps = _begins_in_its_middle(decoder, tokens, mask)
    except (AttributeError, TypeError):
        keeps = False  # a block returns something that has no length
    finally:
        decoder.train(was_training)
    if not keeps:
        decoder.trunk = None
        rank_zero_warn(
            f"{type(decoder.model).__name__} cannot begin in its middle: its frozen blocks run in every pass."
        )


def _begins_in_its_middle(decoder: Decoder, tokens: Tensor, mask: Tensor) -> bool:
    """Whether a pass over some rows with what was kept of them is the whole pass."""
    try:
        whole = decoder(tokens, mask, keep=2)
        assert whole.trunk is not None
        begun = decoder(tokens[1:], mask[1:], keep=2, trunk=whole.trunk[1:])
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # whatever a forward that does not fit stumbles over
    return not whole.trunk.requires_grad and same_logits(begun.logits, whole.logits[1:])
