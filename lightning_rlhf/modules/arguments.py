"""Arguments of modules: as plain values for checkpoints, and refused by name where they are unknown."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from lightning_rlhf.dotted import dotted_name
from lightning_rlhf.generation.sampling import Sampling
from lightning_rlhf.models.loading import ModelSpec
from lightning_rlhf.modules.optimization import plain_factory
from lightning_rlhf.rewards.stored import StoredReward

_LEFT_OUT = object()


class Remembering:
    """Remembers what its subclasses' constructors are called with, under ``_given``.

    It lies below the class that has the arguments, since the command line reads them off the lowest ``__new__`` if that
    stands in the same class as ``__init__``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remembers, and calls nothing."""
        made = super().__new__(cls)
        made.__dict__["_given"] = given_arguments(cls, args, kwargs)
        return made


def given_arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a class was called with, by name.

    Args:
        cls: The class.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        Name and value of each, or nothing if the call does not fit (which the call itself will say).
    """
    try:
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)  # type: ignore[misc]
    except TypeError:
        return {}
    arguments = dict(list(bound.arguments.items())[1:])
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that can be stored as plain values, so that a checkpoint loads with ``weights_only=True``.

    Args:
        arguments: By name.

    Returns:
        Specs and samplings as dicts, functions by the dotted name under which they can be imported. Models, other
        objects and functions that cannot be imported are left out.
    """
    plain = {name: _plain(value) for name, value in arguments.items()}
    return {name: value for name, value in plain.items() if value is not _LEFT_OUT}


def reject_unknown(cls: type, unknown: Mapping[str, Any]) -> None:
    """Refuses arguments that nothing reads.

    Args:
        cls: The class that was called.
        unknown: What is left over.

    Raises:
        TypeError: If anything is, with the name that was probably meant.
    """
    if not unknown:
        return
    known = known_arguments(cls)
    name, value = next(iter(unknown.items()))
    close = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known)}."
    raise TypeError(f"`{name}={value!r}` is no argument of {cls.__name__}: {remedy}")


def known_arguments(cls: type) -> list[str]:
    """What a class takes, what it hands on to its bases by ``**kwargs`` included.

    Args:
        cls: The class.

    Returns:
        The names, in order of the alphabet.
    """
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not takes_more or any(p.kind is p.VAR_KEYWORD and p.name == "unknown" for p in parameters):
            break
    return sorted(set(names) - {"self"})


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ModelSpec | StoredReward):
        return value.plain() or _LEFT_OUT
    if isinstance(value, Sampling):
        return value.plain()
    value = plain_factory(value)
    if isinstance(value, Mapping):
        by_key = {key: _plain(item) for key, item in value.items()}
        return _LEFT_OUT if any(item is _LEFT_OUT for item in by_key.values()) else by_key
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _LEFT_OUT if any(item is _LEFT_OUT for item in items) else items
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    return dotted_name(value) or _LEFT_OUT
