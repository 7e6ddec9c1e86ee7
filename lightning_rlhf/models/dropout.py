"""Dropout, off and on again, in the three forms in which models hide it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

DropoutValues = list[tuple[Any, str, float]]
"""Owner, attribute and original value of every dropout probability of a model."""


def disable_dropout(model: nn.Module) -> DropoutValues:
    """Sets every dropout probability to 0: of ``nn.Dropout``, in attributes of other modules, in their configs.

    ``eval()`` would not do, since gradient checkpointing works in training mode only.

    Args:
        model: Changed in place.

    Returns:
        What was there, for :func:`original_dropout`.
    """
    values: DropoutValues = []
    for owner in _owners(model):
        for name, value in list(vars(owner).items()):
            is_dropout = "drop" in name or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
            if is_dropout and isinstance(value, float) and value > 0.0:
                values.append((owner, name, value))
                setattr(owner, name, 0.0)
    return values


def has_dropout(model: nn.Module) -> bool:
    """Whether some probability is more than 0.

    Args:
        model: Left as it is.

    Returns:
        The answer.
    """
    values = disable_dropout(model)
    for owner, name, value in values:
        setattr(owner, name, value)
    return bool(values)


@contextmanager
def original_dropout(values: DropoutValues) -> Iterator[None]:
    """Puts the original probabilities back for a while, as when the model is saved.

    Args:
        values: From :func:`disable_dropout`.
    """
    for owner, name, value in values:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, _ in values:
            setattr(owner, name, 0.0)


def _owners(model: nn.Module) -> list[Any]:
    """The modules and, once each, the configs that they hold."""
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    return modules + list(configs.values())
