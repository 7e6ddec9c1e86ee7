"""What is compared: prompts with their responses, from any of the forms in which the DataModules read rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_rlhf.data.comparisons import KEYS, comparison
from lightning_rlhf.data.fields import Fields
from lightning_rlhf.data.formats import Row, is_chat, located_rows

MOST = 9
"""Responses to a prompt: each has a key of its own."""

EXPORTED = ("annotator", "comment", "grade", "sources", "task")
"""What exported answers say of themselves, beside the row's own keys."""

FORMS = (
    "'prompt' and 'responses'; 'prompt' and 'response', a row for each response; 'prompt' alone, for responses to be "
    "sampled; or what PreferenceDataModule reads"
)

Prompts = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, and responses to be compared.

    Attributes:
        prompt: A string or chat messages.
        responses: Two or more, no two alike.
        sources: Who wrote them, where that is known.
        metadata: Every other key of the row.
        key: Two tasks with the same key are one.
    """

    prompt: Any
    responses: tuple[str, ...]
    sources: tuple[str | None, ...]
    metadata: Row
    key: str

    @classmethod
    def of(
        cls, prompt: Any, responses: Sequence[str], sources: Sequence[str | None], metadata: Row, key: str | None = None
    ) -> Task | None:
        """Leaves out responses that were there before.

        Args:
            prompt: A string or chat messages.
            responses: Any number.
            sources: One for each.
            metadata: Every other key of the row.
            key: By default a digest of prompt and responses, in whatever order these stand.

        Returns:
            The task, or None if less than two responses are left.
        """
        distinct: dict[str, str | None] = {}
        for response, source in zip(responses, sources, strict=True):
            distinct.setdefault(response, source)
        if len(distinct) < 2:
            return None
        key = key or digest([prompt, *sorted(distinct)])
        return cls(prompt, tuple(distinct), tuple(distinct.values()), metadata, key)


@dataclass(slots=True)
class Read:
    """What a file has.

    Attributes:
        tasks: What can be compared at once.
        prompts: What has no response yet, with its metadata.
        dropped: How many rows are left out because of what.
    """

    tasks: list[Task] = field(default_factory=list)
    prompts: list[tuple[Any, Row]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    _metadata: dict[str, Row] = field(default_factory=dict)

    def add(self, task: Task | None) -> None:
        """Takes a task once, with the metadata in which its rows agree; or counts one with one response only."""
        if task is None:
            self.dropped["one response only, or several that are alike"] += 1
        elif self._is_new(task.key, task.metadata):
            self.tasks.append(task)

    def add_prompt(self, prompt: Any, metadata: Row) -> None:
        """Takes a prompt that has no response yet, likewise.

        Args:
            prompt: A string or chat messages.
            metadata: Every other key of the row; less of it where a later row has the same prompt.
        """
        if self._is_new(digest([prompt]), metadata):
            self.prompts.append((prompt, metadata))

    def _is_new(self, key: str, metadata: Row) -> bool:
        shared = self._metadata.setdefault(key, metadata)
        agree(shared, metadata)
        return shared is metadata


def digest(value: Any) -> str:
    """What stands for a value that can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def agree(shared: Row, metadata: Row) -> None:
    """Leaves what two rows that make one task have in common.

    Args:
        shared: Of the first of them, changed in place.
        metadata: Of another one.
    """
    for name in [name for name, value in shared.items() if name not in metadata or metadata[name] != value]:
        del shared[name]


def read_tasks(source: Any, argument: str = "prompts", columns: Mapping[str, str] | None = None) -> Read:
    """Reads rows in any of the forms that the DataModules know.

    Args:
        source: The path of a JSONL, CSV or Parquet file, or a list of rows: with ``prompt`` and ``responses``; with
            ``prompt`` and ``response``, where the rows with the same prompt make one task, whose metadata is what they
            have in common; with ``prompt`` alone; or any form that :class:`PreferenceDataModule` reads, whose
            preference is not looked at.
        argument: What the user calls the source, for errors.
        columns: The rows' own names for these keys, where they differ.

    Returns:
        What was found.

    Raises:
        ValueError: If a row is none of these, with place, field and value.
    """
    columns = dict(columns or {})
    known = (*KEYS, "response")
    for key in columns:
        if key not in known:
            raise ValueError(f"`columns` names {key!r}, which must be one of {', '.join(map(repr, known))}.")
    found = Read()
    apart: dict[str, tuple[Any, list[str], Row]] = {}
    for place, row in located_rows(source, argument, "prompt"):
        fields = Fields(_jsonable(row, place), place, columns, known)
        row = fields.known
        metadata = _own({name: value for name, value in fields.but(*known).items() if name not in known}, place)
        if "responses" in row:
            row = {key: value for key, value in row.items() if key not in ("scores", "tie", "margin")}
            row["ranks"] = list(range(_count(row["responses"])))
        if {"responses", "chosen", "summaries"} & row.keys():
            read = comparison(row, place, {})
            if len(read.responses) > MOST:
                raise ValueError(f"{place}: `responses` are {len(read.responses)}, and at most {MOST} can be compared.")
            found.add(Task.of(read.prompt, read.responses, [None] * len(read.responses), metadata))
            continue
        prompt, response = row.get("prompt"), row.get("response")
        if not (isinstance(prompt, str) or is_chat(prompt)):
            raise fields.wrong(
                "prompt",
                f"must be text, or a list of chat messages with the keys 'role' and 'content'. A row has {FORMS}",
            )
        if response is None:
            found.add_prompt(prompt, metadata)
        elif isinstance(response, str):
            _, responses, shared = apart.setdefault(digest(prompt), (prompt, [], metadata))
            responses.append(response)
            agree(shared, metadata)
        else:
            raise fields.wrong("response", "must be text")
    for prompt, responses, metadata in apart.values():
        if len(set(responses)) > MOST:
            raise ValueError(
                f"`{argument}` has {len(set(responses))} responses to the prompt {_short(prompt)}, and at most {MOST} "
                "can be compared."
            )
        found.add(Task.of(prompt, responses, [None] * len(responses), metadata))
    return found


def _jsonable(row: Row, place: str) -> Row:
    """A row as it will be read from the database."""
    try:
        return json.loads(json.dumps(row, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place} holds what cannot be written as JSON: {error}") from error


def _own(metadata: Row, place: str) -> Row:
    """Without what an exported answer says of itself: the next ones are of others."""
    if {"annotator", "task"} <= metadata.keys():
        return {name: value for name, value in metadata.items() if name not in EXPORTED}
    for name in EXPORTED:
        if name in metadata:
            raise ValueError(
                f"{place}: `{name}={_short(metadata[name])}` has a name that exported answers need: give it another."
            )
    return metadata


def _count(responses: Any) -> int:
    """How many there are; that they are a list of texts at all is looked at later."""
    if isinstance(responses, str):
        try:
            responses = json.loads(responses)
        except (ValueError, RecursionError):
            return 0
    return len(responses) if isinstance(responses, list) else 0


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
