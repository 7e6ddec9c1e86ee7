"""The form of networks without their weights, which processes hand to each other, and the weights that follow."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def form_of(built: Any) -> bytes:
    """Whatever holds networks, without the weights of these.

    Buffers come along: many are in no file (rotary frequencies), and they are small.

    Args:
        built: All of it in one object, so that what is shared or tied stays so.

    Returns:
        What :func:`of_form` makes the same of.

    Raises:
        pickle.PicklingError: If something in it cannot leave the process; AttributeError or TypeError likewise.
    """
    written = io.BytesIO()
    _Writer(written).dump(built)
    return written.getvalue()


def of_form(form: bytes) -> Any:
    """The same again, with parameters that take no memory.

    Args:
        form: From :func:`form_of`.

    Returns:
        The object, its parameters on the meta device.
    """
    return _Reader(io.BytesIO(form)).load()


class _Writer(pickle.Pickler):
    """Writes of a parameter what it is like."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, nn.Parameter):
            return None
        number = self._numbers.setdefault(id(value), len(self._numbers))
        return number, tuple(value.shape), value.dtype, value.requires_grad


class _Reader(pickle.Unpickler):
    """Makes of that a parameter without memory, the same one wherever it was."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._parameters: dict[int, nn.Parameter] = {}

    def persistent_load(self, description: Any) -> nn.Parameter:
        number, shape, dtype, requires_grad = description
        if number not in self._parameters:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self._parameters[number] = nn.Parameter(empty, requires_grad=requires_grad)
        return self._parameters[number]


@torch.no_grad()
def fill(network: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Gives every process its part of each weight, one weight after the other; a collective.

    Args:
        network: Sharded, its parameters on the meta device.
        whole: The same, neither: on the first process; None on the others.
        device: Where the parts are to be.
    """
    sources = {} if whole is None else dict(whole.named_parameters())
    filled = {id(p): _part(p, sources.get(name), device) for name, p in network.named_parameters()}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]


def _part(parameter: Any, source: Tensor | None, device: torch.device) -> nn.Parameter:
    """Of a weight that the first process holds, what is this one's."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    rows = -(-parameter.shape[0] // mesh.size())  # of every process but the last ones, as FSDP2 deals them
    part = torch.empty(rows, *parameter.shape[1:], dtype=parameter.dtype, device=device)
    parts = None
    if source is not None:
        padded = part.new_zeros(rows * mesh.size(), *parameter.shape[1:])
        padded[: len(source)] = source
        parts = list(padded.split(rows))
    dist.scatter(part, parts, group=mesh.get_group(), group_src=0)
    own = part[: parameter.to_local().shape[0]]
    shard = DTensor.from_local(
        own, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(shard, requires_grad=parameter.requires_grad)
