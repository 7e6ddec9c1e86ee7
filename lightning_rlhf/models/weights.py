"""Weights of a module, whole, whether or not it is sharded over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or put together from its shards; a collective for those.

    Args:
        tensor: Plain or sharded.

    Returns:
        A plain one.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module on the CPU, put together from shards where there are some; a collective for those.

    Args:
        module: Plain or sharded.

    Returns:
        Plain tensors by name; what is tied is one tensor.
    """
    state = module.state_dict(keep_vars=True)
    wholes = {id(tensor): whole(tensor.detach()).cpu() for tensor in state.values()}
    return {name: wholes[id(tensor)] for name, tensor in state.items()}


@torch.no_grad()
def load_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Gives a module a whole state; of a sharded one every process takes its part.

    Args:
        module: Plain or sharded.
        state: From :func:`whole_state`.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if any(hasattr(tensor, "full_tensor") for tensor in module.state_dict().values()):
        set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)
