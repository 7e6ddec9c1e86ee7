"""The fields of a row: found under whatever names they have, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_rlhf.data.formats import Row, is_chat

ALIASES: dict[str, tuple[str, ...]] = {"response": ("completion",), "score": ("reward",)}
"""What public data sets call a field where we have another word, and the row has not ours."""


class Fields:
    """The fields of a row under the names that they have here; what is None is not there.

    Args:
        row: As it was read.
        place: Where it is from, for errors.
        columns: What the row's own names are, where they differ.
        keys: Names of the fields that may be asked for.
    """

    def __init__(self, row: Row, place: str, columns: Mapping[str, str], keys: Sequence[str]) -> None:
        self.place = place
        self.keys = sorted(map(str, row))
        self.given = {key: value for key, value in row.items() if value is not None}
        self.names = {key: columns.get(key) or self._own(key) for key in keys}
        self.known = {key: self.given[name] for key, name in self.names.items() if name in self.given}

    def _own(self, key: str) -> str:
        return next((name for name in (key, *ALIASES.get(key, ())) if name in self.given), key)

    def has(self, *keys: str) -> bool:
        """Whether all of these fields are there."""
        return set(keys) <= self.known.keys()

    def but(self, *keys: str) -> Row:
        """What else the row has: its metadata."""
        names = [self.names[key] for key in keys]
        return {str(name): value for name, value in self.given.items() if name not in names}

    def lacks(self, needed: str) -> ValueError:
        """The error of a row that has too little.

        Args:
            needed: What it needs.

        Returns:
            What is to be raised.
        """
        return ValueError(f"{self.place} has the keys {self.keys}: it needs {needed}. Other names go into `columns`.")

    def wrong(self, key: str, must: str, value: Any = None) -> ValueError:
        """The error of a field.

        Args:
            key: Its name.
            must: What it must be.
            value: What it is, where that is not all of it.

        Returns:
            What is to be raised.
        """
        shown = repr(self.known.get(key) if value is None else value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return ValueError(f"{self.place}: `{self.names[key]}={shown}` {must}.")

    def text(self, key: str, value: Any = None) -> str:
        """A field that is text.

        Args:
            key: Its name.
            value: Of it, where it is a part of the field.

        Returns:
            The text.

        Raises:
            ValueError: If it is none, or holds half of a character.
        """
        value = self.known.get(key) if value is None else value
        if not isinstance(value, str):
            raise self.wrong(key, "must be text", value)
        if not _is_whole(value):
            raise self.wrong(key, "holds half of a surrogate pair, which is no character: mend or remove it", value)
        return value

    def number(self, key: str, value: Any = None) -> float:
        """A field that is a finite number, or one written as text.

        Args:
            key: Its name.
            value: Of it, where it is a part of the field.

        Returns:
            The number.
        """
        value = self.known.get(key) if value is None else value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.wrong(key, "must be a finite number", value)
        return number

    def flag(self, key: str) -> bool:
        """A field that is true or false, by default false."""
        value = self.known.get(key, False)
        value = value.item() if isinstance(value, np.generic) else value
        meanings = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}
        if isinstance(value, bool | int | float | str) and str(value).lower() in meanings:
            return meanings[str(value).lower()]
        raise self.wrong(key, "must be true or false")

    def items(self, key: str) -> list[Any]:
        """A field that is a list, or one written as JSON."""
        value = self.known[key]
        if isinstance(value, str):  # as in a cell of a CSV file
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self.wrong(key, "must be a list, or one written as JSON") from None
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise self.wrong(key, "must be a list")
        return list(value)

    def prompt(self) -> Any:
        """The field ``prompt``: text or chat messages."""
        if not self.has("prompt"):
            raise ValueError(f"{self.place} has no `{self.names['prompt']}`: give one.")
        return self.text("prompt") if isinstance(self.known["prompt"], str) else self.messages("prompt")

    def response(self, key: str = "response") -> str:
        """A field that is a response: text, or one message of the assistant."""
        value: Any = self.known.get(key)
        if isinstance(value, str):
            return self.text(key)
        if not is_chat(value) or len(value) != 1 or value[0]["role"] != "assistant":
            raise self.wrong(key, "must be text, or one message of the assistant")
        return self.text(key, value[0]["content"])

    def messages(self, key: str) -> list[dict[str, Any]]:
        """A field that is chat messages."""
        value = self.known[key]
        if not is_chat(value) or not all(isinstance(m["content"], str) and isinstance(m["role"], str) for m in value):
            text = "" if key == "messages" else "text, or "
            raise self.wrong(key, f"must be {text}a list of chat messages with the keys 'role' and 'content'")
        for message in value:
            self.text(key, message["content"])
        return value


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
