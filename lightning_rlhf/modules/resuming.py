"""Whether a checkpoint is one that a module can go on from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Set
from typing import Any

import lightning as L

from lightning_rlhf.modules.optimization import UNDECAYED

STATE = "lightning_rlhf"
"""The key under which checkpoints hold what is neither weight nor optimizer."""


def algorithm_of(module: L.LightningModule) -> str:
    """The name of a module's algorithm; that of a user's own subclass is its parent's.

    Args:
        module: Of this library, or derived from one.

    Returns:
        The name of the first of its classes that is this library's; or its own, if that is only a base.
    """
    of_library = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("lightning_rlhf."))
    return (type(module) if inspect.isabstract(of_library) else of_library).__name__


def check_resumable(module: Any, checkpoint: Mapping[str, Any], left_out: Set[str] = frozenset()) -> None:
    """Refuses what a module cannot go on from, before torch compares names of weights.

    Args:
        module: Its networks built.
        checkpoint: As Lightning read it.
        left_out: Names of weights that it need not hold.

    Raises:
        ValueError: If another module wrote it, or this one had another network.
    """
    mine, saved = algorithm_of(module), checkpoint.get(STATE, {}).get("algorithm")
    if saved != mine:
        writer = "was not written by a module of lightning_rlhf" if saved is None else f"is a checkpoint of {saved}"
        raise ValueError(
            f"`ckpt_path` {writer}, and {mine} cannot go on from it: to begin with its weights, export them with "
            f"`save_pretrained` and pass the folder as `{module.network_argument}`."
        )
    difference = _difference(module, checkpoint, left_out)
    if difference:
        raise ValueError(
            f"`{module.network_argument}` is not the network that `ckpt_path` holds: {difference}. Resume with the "
            "model that the run began with, or begin a new run without `ckpt_path`."
        )


def _difference(module: Any, checkpoint: Mapping[str, Any], left_out: Set[str]) -> str:
    """The first way in which a module's parameters differ from those in a checkpoint, in words."""
    saved = checkpoint.get("state_dict")
    if not saved:  # written in pieces, one a process
        return ""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items() if name not in left_out}
    for name, shape in own.items():
        if name not in saved:
            return f"it has `{name}`, and the checkpoint does not"
        if tuple(saved[name].shape) != shape:
            return f"`{name}` is {shape} here and {tuple(saved[name].shape)} there"
    more = [name for name in saved if name not in own and name not in left_out]
    if more:
        return f"the checkpoint has `{more[0]}`, and it does not"
    trained = sum(parameter.requires_grad for parameter in module.parameters())
    for optimizer in checkpoint.get("optimizer_states", []):
        groups = {group.get("name"): len(group["params"]) for group in optimizer.get("param_groups", [])}
        in_groups = sum(groups.values())
        if in_groups != trained:
            return f"{trained} of its parameters train, and {in_groups} did before"
        splits = any(str(name).endswith(UNDECAYED) for name in groups)
        if splits == module.decay_norms_and_biases and groups.keys() & {"policy", "policy" + UNDECAYED}:
            return f"it was trained with `decay_norms_and_biases={not splits}`"
    return ""
