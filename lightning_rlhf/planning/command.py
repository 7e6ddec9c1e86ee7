"""From the sections of a configuration to a printed plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.planning.placement import Placement
from lightning_rlhf.planning.plan import Plan, Sizes
from lightning_rlhf.planning.report import advice, fits, table, verdict

NOT_COUNTED = (
    "Not counted: what a driver and libraries take (about 1 GiB on a GPU), memory in pieces too small to be used "
    "again, and whatever reward functions and callbacks hold."
)


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for beside the configuration.

    Args:
        devices: On all machines together; what the configuration says by default.
        memory: Of each device, in GiB.
        prompt_tokens: Of the longest prompt; 512 by default, or what the policy has room for.
        response_tokens: Of the longest response that is imitated; one that is written has ``max_new_tokens``.
    """

    devices: int | None = None
    memory: float = 80.0
    prompt_tokens: int | None = None
    response_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("devices", "memory", "prompt_tokens", "response_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}={value}` must be positive.")


def plan_run(
    module: RLHFModule,
    trainer: Mapping[str, Any],
    data: Mapping[str, Any],
    asked: Asked,
    load_data: Callable[[], Any],
) -> Plan:
    """Prints where the memory of a run goes, and whether it fits.

    Args:
        module: That has not built its networks.
        trainer: The section of that name.
        data: The section of that name: a class and its arguments.
        asked: What else is to be known.
        load_data: Makes the DataModule, if its arguments do not say how large a batch is.

    Returns:
        The plan.

    Raises:
        ValueError: If the run would be refused, or something is not known.
    """
    placement = Placement.of(trainer, asked.devices)
    arguments = data.get("init_args") or {}
    batch = arguments.get("batch_size") or load_data().batch_size
    sizes = Sizes(batch, asked.prompt_tokens, asked.response_tokens, arguments.get("batch_tokens"))
    plan = Plan.of(module, placement, sizes)
    console = Console(soft_wrap=True)
    console.print(table(plan), verdict(plan, placement, asked.memory), sep="\n", highlight=False, markup=False)
    if not fits(plan, asked.memory):
        changes = advice(plan, module, placement)
        console.print("What would help:", *(f"- {text}" for text in changes), sep="\n", highlight=False, markup=False)
    console.print(*plan.facts, NOT_COUNTED, sep="\n", highlight=False, markup=False)
    return plan
