"""Frozen networks that wait in host memory until they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


@contextmanager
def fetched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Brings a frozen network to a device for a while.

    Its weights stay where they were, so that nothing is brought back. What is on the device already, such as weights
    that are another network's too, is left alone.

    Args:
        network: None of whose weights changes meanwhile.
        device: Where it is asked.
    """
    places = [
        (kept, name, tensor)
        for module in network.modules()
        for kept in (module._parameters, module._buffers)
        for name, tensor in kept.items()
        if tensor is not None and tensor.device != device
    ]
    there: dict[int, Tensor] = {}  # what is tied is brought once
    for kept, name, tensor in places:
        if id(tensor) not in there:
            copy = tensor.detach().to(device, non_blocking=True)
            there[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
        kept[name] = there[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for kept, name, tensor in places:
            kept[name] = tensor  # type: ignore[assignment]


def wait(network: nn.Module, shared: nn.Module | None = None) -> None:
    """Sends a frozen network to host memory.

    Args:
        network: Changed in place.
        shared: A network whose weights stay where they are.
    """
    stay = set() if shared is None else {id(tensor) for tensor in [*shared.parameters(), *shared.buffers()]}
    for module in network.modules():
        for kept in (module._parameters, module._buffers):
            for tensor in kept.values():
                if tensor is not None and id(tensor) not in stay:
                    tensor.data = tensor.data.to(HOST)
