"""Whole weights and gradients that FSDP2 holds beside the parts, for as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lightning_rlhf.planning.outlines import Network
from lightning_rlhf.planning.placement import Placement

BLOCKS_AT_ONCE = 3
"""Blocks that are gathered at a time: the one that runs, the next one, and the buffer that this one is copied from."""


def while_writing(network: Network, placement: Placement) -> int:
    """What is whole while a network writes: all of it, or what a pass needs where each token gathers that.

    Args:
        network: That is sharded or not.
        placement: Of the run.

    Returns:
        Bytes beside the parts; 0 where nothing is sharded.
    """
    if not placement.holds_weights:
        return while_running([network], placement)
    return whole(network.parameters, placement)


def while_running(networks: Sequence[Network], placement: Placement) -> int:
    """What is whole at a time in a pass: all that lies outside of blocks, and a few blocks.

    Args:
        networks: That are sharded or not, and share the pass.
        placement: Of the run.

    Returns:
        Bytes beside the parts; 0 where nothing is sharded.
    """
    blocks = [whole(block.parameters(), placement) for network in networks for block in network.blocks]
    return at_once(sum(whole(network.outside, placement) for network in networks), blocks)


def whole(parameters: Iterable[nn.Parameter], placement: Placement) -> int:
    """What parameters take once their parts are put together.

    Args:
        parameters: Of networks; one that is there twice counts once.
        placement: Of the run.

    Returns:
        Bytes beside the parts; 0 where nothing is sharded.
    """
    if not placement.is_sharded:
        return 0
    unique = {id(p): p for p in parameters}.values()
    return sum(p.numel() * placement.exchanged(p.dtype)[0].itemsize for p in unique)


def at_once(root: int, blocks: Iterable[int]) -> int:
    """What is whole at a time.

    Args:
        root: Bytes of what lies outside of blocks.
        blocks: Bytes of each block.

    Returns:
        The bytes.
    """
    return root + max(root, BLOCKS_AT_ONCE * max(blocks, default=0))  # when the root is gathered it is copied too


def exchanged(networks: Sequence[Network], placement: Placement) -> int:
    """Gradients that are not spread yet: those outside of blocks to the end, and those of a block at a time.

    Each is there as the backward pass makes it, and in the type in which all devices add it up. DDP has a copy of all
    gradients in its buckets.

    Args:
        networks: That train, in one backward pass.
        placement: Of the run.

    Returns:
        Bytes beside the parts; 0 on one device.
    """
    if placement.spread == "ddp":
        return sum(placement.bytes_of(network.trained) for network in networks)
    if not placement.is_sharded:
        return 0
    roots = [_gradients(network.outside, placement) for network in networks]
    blocks = [sum(_gradients(block.parameters(), placement)) for network in networks for block in network.blocks]
    return sum(made for made, _ in roots) + max([*(added for _, added in roots), *blocks])


def _gradients(parameters: Iterable[nn.Parameter], placement: Placement) -> tuple[int, int]:
    """Bytes of the gradients, and of these in the type in which they are added up."""
    trained = {id(p): p for p in parameters if p.requires_grad}.values()
    types = [(p.numel(), *placement.exchanged(p.dtype)) for p in trained]
    return sum(n * made.itemsize for n, made, _ in types), sum(n * added.itemsize for n, _, added in types)
