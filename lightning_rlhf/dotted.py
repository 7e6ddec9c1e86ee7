"""Objects by their dotted names, for command lines and checkpoints."""

from __future__ import annotations

import importlib
from typing import Any


def imported(name: str, argument: str) -> Any:
    """The object behind a dotted name, such as ``"my_reward.score"``.

    Args:
        name: Module and attribute.
        argument: What the user calls it, for errors.

    Returns:
        What it names.

    Raises:
        ValueError: If there is no such thing.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`{argument}={name!r}` must be a callable or the dotted name of one that can be imported: {error}"
        ) from error


def dotted_name(value: Any) -> str | None:
    """The name under which importing gives the same object.

    Args:
        value: A function or class.

    Returns:
        What :func:`imported` takes; None where there is no such name, as for a lambda or what ``__main__`` defines.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module in (None, "__main__") or name is None or "." in name:
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return f"{module}.{name}" if found is value else None
