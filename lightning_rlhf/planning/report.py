"""A plan as a table, whether it fits, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.table import Table
from torch import nn

from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.critics import ActorCriticModule
from lightning_rlhf.modules.online import OnlineModule
from lightning_rlhf.modules.optimization import is_bitsandbytes, make_optimizer
from lightning_rlhf.planning.paper import ACTIVATIONS, CACHE, GRADIENTS, LOGITS
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.planning.plan import (
    EXCHANGE,
    GATHERED,
    GENERATE,
    OPTIMIZER,
    PARTS,
    POLICY,
    REFERENCE,
    REWARD,
    TRUNK,
    VALUE,
    Plan,
)
from lightning_rlhf.strategies.fsdp2 import NAME

GIB = 2**30


def table(plan: Plan) -> Table:
    """Gigabytes of a device by part and phase; parts that take nothing are left out.

    Args:
        plan: Of a run.

    Returns:
        The table.
    """
    shown = Table("GiB on each device", title=None)
    for phase in plan.bytes:
        shown.add_column(phase, justify="right")
    for part in PARTS:
        sizes = [held[part] for held in plan.bytes.values()]
        if any(sizes):
            shown.add_row(part, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    shown.add_section()
    shown.add_row("together", *(f"{held.total() / GIB:.2f}" for held in plan.bytes.values()))
    return shown


def fits(plan: Plan, memory: float) -> bool:
    """Whether a device has room.

    Args:
        plan: Of a run.
        memory: Of a device, in GiB.

    Returns:
        The answer.
    """
    return plan.total <= memory * GIB


def verdict(plan: Plan, placement: Placement, memory: float) -> str:
    """Whether a device has room, in a sentence.

    Args:
        plan: Of a run.
        placement: Of the run.
        memory: Of a device, in GiB.

    Returns:
        The sentence.
    """
    where = "the device" if placement.devices == 1 else f"each of {placement.devices} devices"
    answer = "Fits" if fits(plan, memory) else "Does NOT fit"
    return f"{answer}: {plan.total / GIB:.1f} of {memory:g} GiB on {where}, most of all in `{plan.peak}`."


def advice(plan: Plan, module: RLHFModule, placement: Placement) -> list[str]:
    """What to change so that a run takes less, first where most goes.

    Args:
        plan: Of the run.
        module: That trains.
        placement: Of the run.

    Returns:
        Sentences; none of what is as small as it gets.
    """
    parts = sorted(PARTS, key=lambda part: -plan.bytes[plan.peak][part])
    large = [part for part in parts if plan.bytes[plan.peak][part] > 0.05 * plan.total]
    return list(dict.fromkeys(text for part in large for text in _remedies(part, plan.peak, module, placement)))


def _remedies(part: str, phase: str, module: RLHFModule, placement: Placement) -> Iterator[str]:
    spec, shares = module.spec, placement.is_sharded
    if part in (POLICY, REFERENCE, GRADIENTS, OPTIMIZER) and not shares and spec.quantization is None:
        yield f"`trainer.strategy: {NAME}` gives each device a part of all weights, gradients and optimizer state."
    if part == POLICY and spec.adapter is not None and spec.dtype == "float32":
        yield "`policy.dtype: bfloat16` halves the frozen weights, beside which the adapter is in single precision."
    if part == POLICY and spec.adapter is not None and spec.quantization is None and not shares:
        yield "`policy.quantization: nf4-dq` holds frozen weights in four bits."
    if part in (POLICY, GRADIENTS, OPTIMIZER, EXCHANGE) and spec.adapter is None and spec.num_layers_unfrozen == -1:
        yield "`policy.adapter` or `policy.num_layers_unfrozen` trains less, and needs no full copy as the reference."
    if part == OPTIMIZER and not shares and spec.adapter is None and not _is_of_bitsandbytes(module):
        yield "`optimizer: bitsandbytes.optim.AdamW8bit` takes a quarter of AdamW's memory."
    if part in (POLICY, GRADIENTS, OPTIMIZER, REFERENCE) and shares:
        yield "More devices: each then has a smaller part."
    if part == GATHERED and placement.precision == "32-true":
        yield "`trainer.precision: bf16-mixed` gathers weights in half the size."
    if part == GATHERED and phase == GENERATE and placement.holds_weights:
        yield (
            "The whole policy is on every device while it writes: `hold_weights: false` of `RLHFStrategy` gathers it "
            "block by block for every token instead, which takes longer."
        )
    if part == VALUE and isinstance(module, ActorCriticModule) and not module.sampler_keeps_values:
        yield "A value head on the policy's own states (no `critic`, `num_value_layers_unfrozen: 0`) copies no blocks."
    if part in (REFERENCE, REWARD) and not shares and isinstance(module, OnlineModule) and not module.offload_frozen:
        yield "`offload_frozen: true` keeps reference and reward models in host memory while they are not asked."
    if part == REFERENCE:
        yield "`kl_coef: 0` needs no reference."
    if part == REWARD:
        yield "`device: cpu` of the reward model, or its `quantization`, makes room for the policy."
    if part == TRUNK:
        yield "A smaller `trunk_gib` runs frozen blocks again instead of keeping what they made."
    yield from _smaller_batches(part, phase, module)


def _is_of_bitsandbytes(module: RLHFModule) -> bool:
    return is_bitsandbytes(make_optimizer(module.optimizer, [{"params": [nn.Parameter(torch.empty(1))]}]))


def _smaller_batches(part: str, phase: str, module: RLHFModule) -> Iterator[str]:
    if part == CACHE or (part in (ACTIVATIONS, LOGITS, TRUNK) and phase == GENERATE):
        yield "A smaller `data.batch_size` or `sampling.max_new_tokens` writes less at a time."
    elif part in (ACTIVATIONS, LOGITS):
        if not module.spec.gradient_checkpointing:
            yield "`policy.gradient_checkpointing: true` computes activations again instead of holding them."
        if isinstance(module, OnlineModule):
            if module.micro_batch_tokens is not None:
                yield "A smaller `micro_batch_tokens` holds fewer rows at a time, and changes no result."
            elif module.micro_batch_size != 1:
                yield "A smaller `micro_batch_size` holds fewer rows at a time, and changes no result."
        else:
            yield "A smaller `data.batch_size`, and more `trainer.accumulate_grad_batches`, holds fewer rows at a time."
