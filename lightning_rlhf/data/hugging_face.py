"""Data sets of Hugging Face by address: on their hub, or in a folder where one was saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

PREFIX = "hf://datasets/"
OPTIONS = ("split", "name", "data_dir", "data_files", "streaming")
"""What may stand behind the ``?`` of an address: arguments of ``datasets.load_dataset``."""
SAVED = ("dataset_info.json", "dataset_dict.json")
"""One of which lies in a folder that ``save_to_disk`` wrote."""


def opened(source: Any, argument: str) -> Any:
    """The data set that an address stands for.

    Args:
        source: ``"hf://datasets/<owner>/<name>"``, perhaps with ``@<revision>`` and then
            ``?split=<split>&streaming=true`` and others of :data:`OPTIONS`, of which ``data_files`` may be there
            several times; or a folder that ``save_to_disk`` wrote, perhaps with ``?split=<split>``; or anything else.
        argument: What the user calls it, for errors.

    Returns:
        One split, or a stream of it; anything else as it is.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If the address is not understood, or the data set cannot be loaded.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    address, _, query = os.fspath(source).partition("?")
    is_remote = address.startswith(PREFIX)
    if not (is_remote or any(Path(address, name).is_file() for name in SAVED)):
        return source
    asked = f"`{argument}={os.fspath(source)!r}`"
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{asked} is read by datasets: `pip install lightning-rlhf[datasets]`.") from error
    options = _options(query, ("split",) if not is_remote else OPTIONS, asked)
    try:
        if is_remote:
            path, _, revision = address.removeprefix(PREFIX).partition("@")
            found = datasets.load_dataset(path, revision=revision or None, **options)
        else:
            found = datasets.load_from_disk(address)
    except Exception as error:  # of whatever the data set, the hub or the network is to blame for
        raise ValueError(f"{asked} cannot be loaded ({type(error).__name__}: {error}).") from error
    return _one_split(found, None if is_remote else options.get("split"), asked)


def _options(query: str, known: tuple[str, ...], asked: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):  # splits are added by a plus
        if name not in known:
            raise ValueError(f"{asked} says {name!r}, which must be one of {', '.join(map(repr, known))}.")
        if name in options and name != "data_files":
            raise ValueError(f"{asked} says {name!r} twice: say it once.")
        options[name] = [*options.get(name, []), value] if name == "data_files" else value
    streaming = options.get("streaming", "false").lower()
    if streaming not in ("true", "false"):
        raise ValueError(f"{asked}: `streaming={streaming}` must be true or false.")
    if len(options.get("data_files", [])) == 1:
        options["data_files"] = options["data_files"][0]
    return options | ({"streaming": streaming == "true"} if "streaming" in options else {})


def _one_split(found: Any, split: str | None, asked: str) -> Any:
    if not isinstance(found, Mapping):
        if split is not None:
            raise ValueError(f"{asked} is one split alone: leave '?split={split}' out.")
        return found
    names = [split] if split is not None else list(found)
    if len(names) != 1 or names[0] not in found:
        splits = ", ".join(map(repr, found))
        raise ValueError(f"{asked} has the splits {splits}: name one of them, as '?split={next(iter(found))}'.")
    return found[names[0]]
