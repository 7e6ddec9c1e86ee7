"""Optimizers and schedules, as the command line and checkpoints understand them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
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


UNDECAYED = "_undecayed"
"""What the name of a group without weight decay ends with."""


def parameter_groups(
    parts: Mapping[str, nn.Module], learning_rates: Mapping[str, float] | None, decay_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """What trains, in groups: one for each part, or two, the second of which does not decay.

    Args:
        parts: Modules by name; what two of them share is the first one's.
        learning_rates: By name of a part, where it is not the optimizer's.
        decay_norms_and_biases: Whether weight decay is for all weights, or for matrices and embeddings alone.

    Returns:
        Groups that hold something, each with its name.

    Raises:
        ValueError: If a rate is for no part that trains, or is negative.
    """
    seen: set[int] = set()
    groups: list[dict[str, Any]] = []
    for part, module in parts.items():
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        rate = {"lr": float(learning_rates[part])} if learning_rates and part in learning_rates else {}
        # Norms and biases are what has one dimension.
        decayed = [p for p in own if decay_norms_and_biases or p.dim() > 1]
        undecayed = [p for p in own if not decay_norms_and_biases and p.dim() <= 1]
        groups += [{"params": decayed, "name": part, **rate}] if decayed else []
        groups += [{"params": undecayed, "name": part + UNDECAYED, "weight_decay": 0.0, **rate}] if undecayed else []
    trained = [part for part in parts if any(group["name"] in (part, part + UNDECAYED) for group in groups)]
    for part, value in (learning_rates or {}).items():
        if part not in trained:
            raise ValueError(
                f"`learning_rates` names {part!r}, which is no part that trains: {', '.join(map(repr, trained))}."
            )
        if not value >= 0:
            raise ValueError(f"`learning_rates={{{part!r}: {value}}}` must not be negative.")
    return groups


def make_optimizer(
    optimizer: OptimizerLike, groups: list[dict[str, Any]], embeddings: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """Builds an optimizer over parameter groups.

    Args:
        optimizer: A factory, or its plain form.
        groups: Parameters, with a name each.
        embeddings: Whose state an 8-bit optimizer keeps in 32 bits.

    Returns:
        The optimizer.

    Raises:
        ValueError: If it is one of bitsandbytes', and weights are sharded.
    """
    made = _factory(default_optimizer if optimizer is None else optimizer, "optimizer")(groups)
    if any(hasattr(parameter, "full_tensor") for group in groups for parameter in group["params"]):
        check_shards(made)
    if is_bitsandbytes(made):
        _keep_in_32_bits(made, embeddings)
    return made


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of bitsandbytes'; without importing that.

    Args:
        optimizer: Any.

    Returns:
        The answer.
    """
    return any(cls.__module__.startswith("bitsandbytes.") for cls in type(optimizer).__mro__)


def check_shards(optimizer: Optimizer) -> None:
    """Refuses an optimizer that cannot update sharded weights.

    Args:
        optimizer: Of weights that are, or are to be, sharded.

    Raises:
        ValueError: If it is one of bitsandbytes'.
    """
    if is_bitsandbytes(optimizer):
        raise ValueError(
            f"`optimizer={type(optimizer).__name__}` of bitsandbytes cannot update sharded weights: use "
            "`torch.optim.AdamW`, whose state is sharded too, or `Trainer(strategy='ddp')`."
        )


def _keep_in_32_bits(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """As bitsandbytes advises for embeddings, whose gradients differ most between rows.

    Its manager of such exceptions is one for the whole process and knows parameters by their ``id``, which others get
    once these are gone: this optimizer has its own.
    """
    manager = copy.copy(optimizer.mng)
    manager.pid2config = dict(manager.pid2config)
    for parameter in parameters:
        manager.pid2config[id(parameter)] = {"optim_bits": 32, **manager.pid2config.get(id(parameter), {})}
    optimizer.mng = manager


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
