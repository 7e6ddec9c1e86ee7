"""Optimizers and schedules, as the command line and checkpoints understand them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_rlhf.dotted import imported

Schedule = Literal["constant", "linear", "cosine"]
if TYPE_CHECKING:
    OptimizerLike = Callable[[Any], Optimizer] | Mapping[str, Any] | str | None
    SchedulerLike = Callable[[Optimizer], LRScheduler] | Mapping[str, Any] | Schedule | str
else:
    # What the command line reads: it makes factories of names and dicts, and finds a misspelt one.
    # It writes a value as the first type that takes it, and factories take every name.
    OptimizerLike = Callable[[Any], Optimizer] | None
    SchedulerLike = Schedule | Callable[[Optimizer], LRScheduler]
"""Makes an optimizer of parameter groups, or a schedule over an optimizer: a factory, its dotted name, or
``{"class_path": ..., "init_args": ...}``; by default AdamW, and a rate that stays."""


def default_optimizer(parameters: Any) -> Optimizer:
    """AdamW with trlX's settings: learning rate 3e-5, betas 0.9 and 0.95, weight decay 1e-6."""
    return torch.optim.AdamW(parameters, lr=3e-5, betas=(0.9, 0.95), weight_decay=1e-6, fused=True)


def make_optimizer(optimizer: OptimizerLike, groups: list[dict[str, Any]]) -> Optimizer:
    """Builds an optimizer over parameter groups.

    Args:
        optimizer: A factory, or its plain form.
        groups: Parameters, with a name each.

    Returns:
        The optimizer.
    """
    return _factory(default_optimizer if optimizer is None else optimizer, "optimizer")(groups)


def make_scheduler(
    scheduler: SchedulerLike, optimizer: Optimizer, warmup_updates: int, progress: Callable[[], float]
) -> LRScheduler:
    """Builds a schedule over an optimizer, to be stepped after every update.

    Args:
        scheduler: A factory or its plain form, which counts for itself; or a name: the rate stays, falls to 0 in a
            line, or as half a cosine.
        optimizer: Whose rates are set.
        warmup_updates: Over so many updates a named schedule also rises in a line.
        progress: How far the run has come, from 0 to 1.

    Returns:
        The scheduler.

    Raises:
        ValueError: If there is no such name, or warm-up is asked of a factory.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda p: 1.0,
        "linear": lambda p: 1.0 - p,
        "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
    }
    if not isinstance(scheduler, str) or "." in scheduler:
        if warmup_updates:
            raise ValueError(
                f"`warmup_updates={warmup_updates}` goes with a named `lr_scheduler`: a factory has its own."
            )
        return _factory(scheduler, "lr_scheduler")(optimizer)
    if scheduler not in shapes:
        raise ValueError(f"`lr_scheduler={scheduler!r}` must be one of {sorted(shapes)}, or a factory.")
    shape = shapes[scheduler]

    def factor(updates: int) -> float:
        warm = min(1.0, (updates + 1) / warmup_updates) if warmup_updates else 1.0
        return warm * shape(min(1.0, progress()))

    return LambdaLR(optimizer, factor)


def _factory(factory: Any, argument: str) -> Callable[[Any], Any]:
    """A factory, whatever form it has."""
    if isinstance(factory, str):
        factory = imported(factory, argument)
    elif isinstance(factory, Mapping) and "class_path" in factory:
        factory = functools.partial(imported(factory["class_path"], argument), **factory.get("init_args", {}))
    if not callable(factory):
        raise TypeError(f"`{argument}={factory!r}` must be a factory, or a dict with 'class_path' and 'init_args'.")
    return factory


def plain_factory(factory: Any) -> Any:
    """The plain form of an optimizer's factory, for checkpoints.

    Args:
        factory: A ``functools.partial`` of a class, or anything else.

    Returns:
        ``{"class_path": ..., "init_args": ...}`` of a partial with plain arguments, else the factory itself.
    """
    if not isinstance(factory, functools.partial):
        return factory
    *before, last = (factory.func, *factory.args)
    # The command line puts functions of its own before the class.
    if isinstance(last, type) and not any(isinstance(part, type) or not callable(part) for part in before):
        return {"class_path": f"{last.__module__}.{last.__qualname__}", "init_args": dict(factory.keywords)}
    return factory
