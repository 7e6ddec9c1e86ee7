"""Responses that were judged step by step, for process reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_rlhf.batches import StepBatch
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.fields import Fields
from lightning_rlhf.data.formats import Row
from lightning_rlhf.data.preferences import Preferences
from lightning_rlhf.data.tokens import Tokenized, at, pad_id, prompt_ids, side_by_side
from lightning_rlhf.models.texts import step_ends, step_ids

KEYS = ("prompt", "steps", "completions", "response", "ends", "labels")
"""What a row's keys may be called; any other is metadata."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A response to a prompt, and what was said of its steps.

    Attributes:
        prompt: A string or chat messages.
        steps: Where they are told apart by the row.
        response: Where they are not, all of it.
        ends: Where steps end in that, in characters, if the row says so.
        labels: One for each step; None where nobody said anything.
        metadata: Every other key of the row.
        place: Where the row is from, for errors.
    """

    prompt: Any
    steps: tuple[str, ...] | None
    response: str
    ends: tuple[int, ...] | None
    labels: tuple[float | None, ...]
    metadata: Row
    place: str


class StepDataModule(RLHFDataModule):
    r"""Responses that were judged step by step.

    Args:
        steps: Dicts with ``prompt`` (a string or chat messages), ``labels`` (a number, true or false for every step, or
            None where nobody said anything), and the response: as ``steps`` (or ``completions``), a list; as
            ``response``, in which the module's ``separator`` stands between steps; or as ``response`` with ``ends``,
            where each step ends, in characters. Other keys are metadata. Or the path of a JSONL, CSV or Parquet file of
            these, or a data set of Hugging Face. May be left out where nothing is trained.
        validation: Rows of the same forms, for validation while training and for ``Trainer.validate``.
        test: Rows for ``Trainer.test``.
        predict: Rows for ``Trainer.predict``.
        **kwargs: Passed to :class:`RLHFDataModule`: batch_size (responses of a batch, per process), columns, splits,
            duplicates, lengths, shuffle, seed, num_workers, cache_dir. Of a response that is cut, the steps that are
            left count.

    Attributes:
        separator: What stands behind every step; the module sets it. None where nothing does.

    Example:
        >>> row = {"prompt": "2 + 2 + 2?", "steps": ["2 + 2 = 4.", "4 + 2 = 7."], "labels": [True, False]}
        >>> StepDataModule([row]).rows[0].labels
        (1.0, 0.0)
    """

    argument = "steps"
    keys = KEYS

    def __init__(
        self,
        steps: Preferences = None,
        *,
        validation: Preferences = None,
        test: Preferences = None,
        predict: Preferences = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(steps, held_out={"validation": validation, "test": test, "predict": predict}, **kwargs)
        self.separator: str | None = "\n"

    def parsed(self, row: Row, place: str) -> list[Steps]:
        """What the row says."""
        return [step_row(row, place, self.columns)]

    def texts(self, row: Steps) -> list[Any]:
        """The prompt, the response, and what was said of its steps."""
        return [row.prompt, row.steps or row.response, row.ends, row.labels]

    def metadata(self, row: Steps) -> Row:
        """Every other key."""
        return row.metadata

    @property
    def reading(self) -> tuple[Any, ...]:
        """With the separator."""
        return (*super().reading, self.separator)

    def tokenized(self, row: Steps, what: str) -> Tokenized:
        """Tokens of prompt and response, each step by itself."""
        item = tokenized_steps(row, self.separator, self.tokenizer)
        found = sum(item.learnt or ())
        if found != len(row.labels):
            raise ValueError(
                f"{row.place}: `labels` are {len(row.labels)}, and the response has {found} steps (with the module's "
                f"`separator={self.separator!r}`): give one for each."
            )
        return item

    def collate(self, items: Sequence[Tokenized]) -> StepBatch:
        """Prompts padded left, responses padded right; a key that a row lacks is None."""
        batch = step_batch(items, pad_id(self.tokenizer))
        batch.metadata = self.columns_of(items)
        return batch


def tokenized_steps(row: Steps, separator: str | None, tokenizer: Any) -> Tokenized:
    """Makes tokens of a response, each step by itself.

    Args:
        row: The response, and what it follows.
        separator: What stands behind every step; None where nothing does.
        tokenizer: Of the reward model.

    Returns:
        The tokens up to the end of the last step; learnt are those that end one.

    Raises:
        ValueError: If the steps cannot be told apart, or are none.
    """
    with at(row.place):
        prompt = prompt_ids(row.prompt, tokenizer)
        response, found = step_ids(*_told_apart(row, separator), separator, tokenizer)
        last = set(found)
        return Tokenized(prompt, [response], row, [t in last for t in range(len(response))])


def step_batch(items: Sequence[Tokenized], pad: int) -> StepBatch:
    """Puts responses side by side.

    Args:
        items: One each.
        pad: What fills them up.

    Returns:
        The batch, without metadata.
    """
    rows: dict[str, Any] = side_by_side(items, pad)
    mask = rows["response_mask"]
    step_mask, labels = torch.zeros_like(mask), torch.zeros(mask.shape, dtype=torch.float32)
    for i, item in enumerate(items):
        last = (t for t, is_last in enumerate(item.learnt or ()) if is_last)
        for t, label in zip(last, item.row.labels, strict=False):  # a response that was cut has fewer
            if label is not None:
                step_mask[i, t], labels[i, t] = True, label
    return StepBatch(**rows, step_mask=step_mask, labels=labels)


def _told_apart(row: Steps, separator: str | None) -> tuple[str, Sequence[int]]:
    """All of a response, and where its steps end."""
    if row.steps is None and row.ends is None and separator is None:
        raise ValueError("with the module's `separator=None` a row needs `steps`, or `ends` beside `response`.")
    if row.steps is None and row.ends is None:
        return row.response, step_ends(row.response, str(separator))
    if row.steps is None and separator is not None:
        raise ValueError(
            f"`ends` say where steps end, and so does the module's `separator={separator!r}`: set it to None."
        )
    if row.steps is None:
        return row.response, row.ends or ()
    between = separator or ""
    for step in row.steps:
        if between and between in step:
            raise ValueError(
                f"the step {step!r} holds the module's `separator={separator!r}`, at which it would be taken apart "
                "later on: choose another one."
            )
    ends = [sum(map(len, row.steps[: k + 1])) + k * len(between) for k in range(len(row.steps))]
    return between.join(row.steps), ends


def step_row(row: Row, place: str, columns: Mapping[str, str]) -> Steps:
    """Reads a row.

    Args:
        row: As :class:`StepDataModule` says.
        place: Where it is from, for errors.
        columns: What the row's own names for the keys are, where they differ.

    Returns:
        What it says.

    Raises:
        ValueError: If it is none of the forms, with place, field and value.
    """
    fields = Fields(row, place, columns, KEYS)
    key = next((name for name in ("steps", "completions") if fields.has(name)), None)
    if not fields.has("labels") or not (key or fields.has("response")):
        raise fields.lacks("'prompt', 'labels', and 'steps' or 'response'")
    labels = tuple(_label(fields, label) for label in fields.items("labels"))
    if all(label is None for label in labels):
        raise fields.wrong("labels", "must say something of one step at least")
    steps = None if key is None else tuple(fields.text(key, step) for step in fields.items(key))
    for step in steps or ():
        if not step.strip():
            raise fields.wrong(str(key), "must be steps that hold text", step)
    ends = None
    if fields.has("ends"):
        ends = tuple(int(fields.number("ends", end)) for end in fields.items("ends"))
    if steps is not None and len(steps) != len(labels):
        raise fields.wrong("labels", f"must be {len(steps)} labels, one for each step")
    response = "" if steps is not None else fields.text("response")
    return Steps(fields.prompt(), steps, response, ends, labels, fields.but(*KEYS), place)


def _label(fields: Fields, label: Any) -> float | None:
    return None if label is None else float(label) if isinstance(label, bool) else fields.number("labels", label)
