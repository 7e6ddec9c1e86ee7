"""Rows from what a user has: Python lists, or files with a JSON object a line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(source: Any, argument: str, text_key: str) -> list[Row]:
    """Rows as dicts, in the order given.

    Args:
        source: The path of a ``.jsonl`` (or ``.jsonl.gz``) file, or a list whose items are dicts, strings or lists of
            chat messages.
        argument: What the user calls the source, for errors.
        text_key: The key that an item which is no dict stands for.

    Returns:
        At least one row.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If there is no row, or one that is not understood.
    """
    if isinstance(source, str | os.PathLike):
        items: Iterable[Any] = _read_jsonl(Path(source), argument)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(f"`{argument}={source!r}` must be a list of rows, or the path of a JSONL file.")
    else:
        items = source
    rows = [dict(item) if isinstance(item, Mapping) else {text_key: item} for item in items]
    if not rows:
        raise ValueError(f"`{argument}` is empty: give at least one row.")
    return rows


def _read_jsonl(path: Path, argument: str) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}={str(path)!r}`: there is no such file (looked in {Path.cwd()}).")
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"`{argument}={str(path)!r}`: line {number} is no JSON: {error}") from error
    return rows


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in prompt)
    )
