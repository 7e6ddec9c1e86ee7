"""Rows from what a user has: Python lists, data sets, or files."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_rlhf.models.texts import is_chat

__all__ = ["Row", "is_chat", "located_rows", "read_rows"]

Row = dict[str, Any]


def read_rows(source: Any, argument: str, text_key: str) -> list[Row]:
    """Rows as dicts, in the order given.

    Args:
        source: As for :func:`located_rows`.
        argument: What the user calls the source, for errors.
        text_key: The key that an item which is no dict stands for.

    Returns:
        At least one row.
    """
    return [row for _, row in located_rows(source, argument, text_key)]


def located_rows(source: Any, argument: str, text_key: str) -> list[tuple[str, Row]]:
    """Rows as dicts, in the order given, each with the words for where it is from.

    Args:
        source: The path of a file: CSV with a header, Parquet, or else a JSON object a line (perhaps ``.gz``); or
            anything whose items are dicts, strings or lists of chat messages, such as a list or a data set of
            Hugging Face.
        argument: What the user calls the source, for errors.
        text_key: The key that an item which is no dict stands for.

    Returns:
        At least one row.

    Raises:
        FileNotFoundError: If the file is missing.
        ImportError: If it is a Parquet file, and what reads it is not installed.
        ValueError: If there is no row, or one that is not understood.
    """
    if isinstance(source, str | os.PathLike):
        items = _read_file(Path(source), argument)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"`{argument}={source!r}` must be a list of rows, or the path of a JSONL file, of CSV or of Parquet."
        )
    else:
        items = ((f"`{argument}[{number}]`", item) for number, item in enumerate(source))
    rows = [(place, dict(item) if isinstance(item, Mapping) else {text_key: item}) for place, item in items]
    if not rows:
        raise ValueError(f"`{argument}` is empty: give at least one row.")
    return rows


def _read_file(path: Path, argument: str) -> Iterator[tuple[str, Any]]:
    name = f"`{argument}={str(path)!r}`"
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no such file (looked in {Path.cwd()}).")
    readers: dict[str, Callable[[Path, str], Iterator[tuple[int, Any]]]] = {".csv": _csv, ".parquet": _parquet}
    unit = "row" if path.suffix == ".parquet" else "line"
    for number, item in readers.get(path.suffix, _jsonl)(path, name):
        yield f"{name}: {unit} {number}", item


def _jsonl(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}: line {number} is no JSON: {error}") from error


def _csv(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{name}: line {reader.line_num} has not as many cells as the header, which has "
                        f"{len(reader.fieldnames or [])}."
                    )
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: line {reader.line_num + 1} is no CSV: {error}") from error


def _parquet(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"{name} is read by pyarrow: `pip install lightning-rlhf[parquet]`.") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is no Parquet: {error}") from error
    yield from enumerate(rows)
