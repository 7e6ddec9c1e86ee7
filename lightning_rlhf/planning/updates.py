"""What an optimizer holds, found by letting it make a step on tensors without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.optimization import check_shards, is_bitsandbytes, make_optimizer, parameter_groups
from lightning_rlhf.planning.live import Live
from lightning_rlhf.planning.networks import Networks
from lightning_rlhf.planning.placement import Placement

STEP = "step"


def optimizer_bytes(module: RLHFModule, networks: Networks, placement: Placement) -> tuple[int, int]:
    """What the module's optimizer takes on a device.

    Args:
        module: Says which optimizer, and its groups.
        networks: Some of which train.
        placement: Of the run.

    Returns:
        Bytes of its state, and those that a step takes beside it for a moment.

    Raises:
        ValueError: If nothing trains, or the optimizer cannot update sharded weights or be planned.
    """
    mode = networks.mode
    groups = parameter_groups(networks.parts, module.learning_rates, module.decay_norms_and_biases)
    if not groups:
        raise ValueError(
            f"`num_layers_unfrozen={module.spec.num_layers_unfrozen}` leaves {type(module).__name__} nothing to train: "
            "unfreeze a block."
        )
    with mode:
        parts = {id(p): _part(p, placement) for group in groups for p in group["params"]}
    modules = [module for network in networks.learning for part in network.modules for module in part.modules()]
    tables = [table for table in modules if isinstance(table, nn.Embedding)]
    embeddings = [parts[id(p)] for table in tables for p in table.parameters() if id(p) in parts]
    groups = [{**group, "params": [parts[id(p)] for p in group["params"]]} for group in groups]
    optimizer: Any = make_optimizer(module.optimizer, groups, embeddings)
    if placement.is_sharded:
        check_shards(optimizer)
    if is_bitsandbytes(optimizer):
        optimizer.fill_qmap()  # which it makes of numbers
    with mode, Live(STEP) as live:
        live.ignore(parts.values())
        live.ignore(p.grad for p in parts.values() if p.grad is not None)
        if is_bitsandbytes(optimizer):
            _begin(optimizer)
            if not placement.is_gpu:
                with KernelsOfCPU():
                    optimizer.step()
        else:
            _step(optimizer, placement)
            live.peak = live.now.copy()  # of the next one, when all of the state is there
            optimizer.step()
    return live.now[STEP], live.peak[STEP] - live.now[STEP]


class KernelsOfCPU(TorchDispatchMode):
    """Lets bitsandbytes' updates be seen where they are spelt out in PyTorch, which is on a CPU.

    On tensors without numbers an operator of its own stands for a kernel that takes nothing beside its arguments; that
    of a CPU makes copies as large as a parameter.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, or what it is made of."""
        from bitsandbytes.backends.cpu import ops

        namespace, _, name = func._schema.name.partition("::")
        spelt_out = getattr(ops, f"_{name}_cpu", None) if namespace == "bitsandbytes" else None
        return (spelt_out or func)(*args, **(kwargs or {}))


def _part(parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
    """What a device has of a parameter, and its gradient."""
    shape, dtype = placement.part(parameter.shape), placement.held(parameter.dtype)
    part = nn.Parameter(torch.empty(shape, dtype=dtype))
    part.grad = torch.empty(shape, dtype=dtype)
    return part


def _begin(optimizer: Any) -> None:
    """Makes all of the state, as bitsandbytes does in its first step, one parameter after the other."""
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, i, j)


def _step(optimizer: Optimizer, placement: Placement) -> None:
    for group in optimizer.param_groups:
        if placement.is_gpu and group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True  # which is what torch chooses there
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"`optimizer={type(optimizer).__name__}` looks at numbers, of which there are none: plan with "
            "`torch.optim.AdamW`, and add what it takes beyond that."
        ) from error
