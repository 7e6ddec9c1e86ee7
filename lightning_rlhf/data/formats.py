"""Rows from what a user has: Python lists, data sets, or files."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from lightning_rlhf.data.hugging_face import opened
from lightning_rlhf.models.texts import is_chat

__all__ = ["Row", "is_chat", "located", "located_rows"]

Row = dict[str, Any]


def located_rows(source: Any, argument: str, text_key: str) -> list[tuple[str, Row]]:
    """All of :func:`located`.

    Args:
        source: Of rows.
        argument: What the user calls it, for errors.
        text_key: The key that an item which is no dict stands for.

    Returns:
        At least one row.

    Raises:
        ValueError: If there is none.
    """
    rows = list(located(source, argument, text_key))
    if not rows:
        raise ValueError(f"`{argument}` is empty: give at least one row.")
    return rows


def located(source: Any, argument: str, text_key: str) -> Iterator[tuple[str, Row]]:
    """Rows as dicts, in the order given, each with the words for where it is from.

    Args:
        source: The path of a file: CSV with a header, Parquet, SQLite as ``lightning-rlhf
            collect`` writes it, or else a JSON object a line (perhaps ``.gz``); the address of a data set, as
            :func:`opened` knows it; or anything whose items are dicts, strings or lists of chat messages, such as a
            list or a data set of Hugging Face.
        argument: What the user calls the source, for errors.
        text_key: The key that an item which is no dict stands for.

    Yields:
        Place and row.

    Raises:
        FileNotFoundError: If the file is missing.
        ImportError: If what reads a Parquet file or a data set is not installed.
        TypeError: If the source holds no rows.
        ValueError: If a line or an address is not understood.
    """
    source = opened(source, argument)
    if isinstance(source, str | os.PathLike):
        items = _read_file(Path(source), argument)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        shown = repr(source) if len(repr(source)) <= 80 else f"{repr(source)[:77]}..."
        raise TypeError(
            f"`{argument}={shown}` must be a list of rows, or the path of a JSONL file, of CSV or of Parquet; of a "
            "data set with several splits, one of them."
        )
    else:
        items = ((f"`{argument}[{number}]`", item) for number, item in enumerate(source))
    for place, item in items:
        yield place, dict(item) if isinstance(item, Mapping) else {text_key: item}


def _read_file(path: Path, argument: str) -> Iterator[tuple[str, Any]]:
    name = f"`{argument}={str(path)!r}`"
    if path.is_dir():
        raise FileNotFoundError(
            f"{name}: there is no such file, but a folder, in which no `save_to_disk` wrote a data set: give a file."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no such file (looked in {Path.cwd()}).")
    unit, reader = _READERS.get(path.suffix, ("line", _jsonl))
    for number, item in reader(path, name):
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


def _sqlite(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Reads a table, or view, of rows as JSON; a server may be writing to the file."""
    import sqlite3  # which nothing else needs

    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=60)) as connection:
            rows = connection.execute("SELECT id, row FROM preferences").fetchall()
    except sqlite3.Error as error:
        raise ValueError(f"{name} is no database of `lightning-rlhf collect`: {error}.") from error
    for number, row in rows:
        yield number, json.loads(row)


_READERS: dict[str, tuple[str, Callable[[Path, str], Iterator[tuple[int, Any]]]]] = {
    ".csv": ("line", _csv),
    ".parquet": ("row", _parquet),
    ".sqlite": ("answer", _sqlite),
}
"""By a file's suffix what its parts are called, and what reads them."""
