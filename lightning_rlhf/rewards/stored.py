"""Rewards that a checkpoint can name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_rlhf.dotted import dotted_name
from lightning_rlhf.models.loading import ModelSpec

_LOST = object()


class StoredReward:
    """A reward that says what it was made of, so that a checkpoint holds plain values and makes the same again."""

    _given: Mapping[str, Any]  # what it was called with, by name

    def plain(self) -> dict[str, Any] | None:
        """What makes the same again, as plain values; None where there is an object or the class cannot be imported."""
        class_path, given = dotted_name(type(self)), _plain(self._given)
        return None if class_path is None or given is _LOST else {"class_path": class_path, "init_args": given}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, ModelSpec | StoredReward):
        return value.plain() or _LOST
    if isinstance(value, Mapping):
        by_key = {key: _plain(item) for key, item in value.items()}
        return _LOST if any(item is _LOST for item in by_key.values()) else by_key
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _LOST if any(item is _LOST for item in items) else items
    return dotted_name(value) or _LOST
