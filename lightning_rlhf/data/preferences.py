"""Comparisons of responses, for reward models."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlhf.batches import PreferenceBatch
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.comparisons import KEYS, Comparison, comparison
from lightning_rlhf.data.formats import located_rows
from lightning_rlhf.data.tokens import pad_id, padded, prompt_ids, response_ids

Preferences = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


class Tokenized(NamedTuple):
    """A comparison in tokens.

    Attributes:
        prompt: Read once, whatever the number of responses.
        responses: Each with its EOS.
        row: What they were made of.
    """

    prompt: list[int]
    responses: list[list[int]]
    row: Comparison

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses))


class PreferenceDataModule(RLHFDataModule):
    """Responses to prompts, and which of them people preferred.

    Args:
        preferences: Dicts with ``prompt`` (a string or chat messages), ``chosen`` and ``rejected``, and perhaps
            ``margin`` or ``tie``; with ``chosen`` and ``rejected`` alone, as transcripts or chat messages, whose common
            beginning is the prompt; with ``prompt``, ``responses`` and ``ranks`` or ``scores``; or with ``info``,
            ``summaries`` and ``choice``. Other keys are metadata. Or the path of a JSONL, CSV or Parquet file of these,
            or of the SQLite file of ``lightning-rlhf collect``, or a data set of Hugging Face. May be left out where
            nothing is trained.
        validation: Rows of the same forms, for validation while training and for ``Trainer.validate``.
        test: Rows for ``Trainer.test``.
        predict: Rows for ``Trainer.predict``.
        columns: The rows' own names for these keys, where they differ, such as ``{"chosen": "response_j"}``.
        max_length: How many tokens a prompt and a response may have together; by default what the model has room for.
        max_prompt_length: How many a prompt may have.
        max_response_length: How many a response may have, its EOS included.
        too_long: Whether a longer row is an ``"error"`` or is left out (``"drop"``); ``dropped`` then says how many
            were, and why.
        batch_size: Comparisons of a batch, per process.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the orders; what ``seed_everything`` set, else 0, by default.
        num_workers: Processes that collate.

    Attributes:
        dropped: Of each of the arguments above that hold rows, how many were left out because of what.

    Example:
        >>> data = PreferenceDataModule([{"prompt": "Hi", "chosen": " there", "rejected": " you"}])
        >>> data.rows[0].responses
        (' there', ' you')
    """

    argument = "preferences"

    def __init__(
        self,
        preferences: Preferences = None,
        *,
        validation: Preferences = None,
        test: Preferences = None,
        predict: Preferences = None,
        columns: Mapping[str, str] | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
        too_long: Literal["error", "drop"] = "error",
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        columns = {} if columns is None else dict(columns)
        for key in columns:
            if key not in KEYS:
                raise ValueError(f"`columns` names {key!r}, which must be one of {', '.join(map(repr, KEYS))}.")
        if too_long not in ("error", "drop"):
            raise ValueError(f"`too_long={too_long!r}` must be 'error' or 'drop'.")
        held_out = {"validation": validation, "test": test, "predict": predict}
        super().__init__(
            _comparisons(preferences, "preferences", columns),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            num_workers=num_workers,
            held_out={name: _comparisons(some, name, columns) for name, some in held_out.items()},
        )
        self.limits = {"row": max_length, "prompt": max_prompt_length, "response": max_response_length}
        for name, limit in {"max_length": max_length, **_named(self.limits)}.items():
            if limit is not None and limit < 1:
                raise ValueError(f"`{name}={limit}` must be at least 1, or None for no limit.")
        self.too_long = too_long
        self.dropped: dict[str, Counter[str]] = {}
        rows = [row for some in (self.rows or [], *self.held_out.values()) for row in some]
        self.metadata_keys = sorted({key for row in rows for key in row.metadata})

    def tokenized(self, row: Comparison, what: str) -> Tokenized:
        """Tokens of the prompt, and of every response."""
        try:
            prompt = prompt_ids(row.prompt, self.tokenizer, self.has_encoder)
            responses = [response_ids(response, self.tokenizer, self.has_encoder) for response in row.responses]
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        return Tokenized(prompt, responses, row)

    def collate(self, items: Sequence[Tokenized]) -> PreferenceBatch:
        """Prompts padded left, and the responses to each, padded right; a key that a row lacks is None."""
        prompts, responses = [item.prompt for item in items], [item.responses for item in items]
        batch = preference_batch(prompts, responses, pad_id(self.tokenizer), [item.row.ranks for item in items])
        batch.margins = torch.tensor([item.row.margin for item in items], dtype=torch.float32)
        batch.metadata = {key: [item.row.metadata.get(key) for item in items] for key in self.metadata_keys}
        return batch

    def _items(self, argument: str, rows: Sequence[Any]) -> list[Any]:
        """What fits; to be measured on, the longest first, so that alike rows lie side by side."""
        dropped: Counter[str] = Counter()
        items = []
        for item in super()._items(argument, rows):
            part, length, limit = self._excess(item)
            if part is None:
                items.append(item)
            elif self.too_long == "drop":
                dropped[part] += 1
            else:
                raise ValueError(
                    f"{item.row.place} has a {part} of {length} tokens, and {limit} may be: shorten it, or leave it "
                    "out, as `too_long='drop'` does."
                )
        self.dropped[argument] = dropped
        if dropped:
            reasons = ", ".join(f"{count} for the length of the {part}" for part, count in sorted(dropped.items()))
            rank_zero_info(f"`{argument}`: {dropped.total()} of {len(rows)} rows are left out: {reasons}.")
        if not items:
            raise ValueError(
                f"`{argument}`: all {len(rows)} rows are too long: raise the limits, which are {self.limits}."
            )
        if argument in ("validation", "test"):
            items.sort(key=lambda item: -len(item.prompt) - item.longest)
        return items

    def _excess(self, item: Tokenized) -> tuple[str | None, int, int | None]:
        """What of a row is too long, its length, and what it may be."""
        room = {"row": self.max_tokens}
        if self.has_encoder:
            room = {"prompt": self.max_tokens, "response": self.max_response_tokens}
        lengths = {"prompt": len(item.prompt), "response": item.longest, "row": len(item.prompt) + item.longest}
        for part, length in lengths.items():
            limit = min((n for n in (self.limits[part], room.get(part)) if n is not None), default=None)
            if limit is not None and length > limit:
                return part, length, limit
        return None, 0, None


def preference_batch(
    prompts: Sequence[list[int]],
    responses: Sequence[list[list[int]]],
    pad: int,
    ranks: Sequence[Sequence[int]] | None = None,
) -> PreferenceBatch:
    """Puts comparisons side by side.

    Args:
        prompts: Tokens of each.
        responses: To each prompt, the best first.
        pad: What fills them up.
        ranks: Places of the responses; by default in the order in which they are there.

    Returns:
        The batch, without margins and metadata.
    """
    most = max(map(len, responses))
    prompt_tokens, prompt_mask = padded(prompts, pad, "left")
    none: list[list[int]] = [[]]
    rows = [row for some in responses for row in some + none * (most - len(some))]
    response_tokens, response_mask = padded(rows, pad, "right")
    places = [range(len(some)) for some in responses] if ranks is None else ranks
    return PreferenceBatch(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        response_tokens=response_tokens.view(len(prompts), most, -1),
        response_mask=response_mask.view(len(prompts), most, -1),
        ranks=torch.tensor([[*some, *[most] * (most - len(some))] for some in places]),
        margins=torch.zeros(len(prompts), dtype=torch.float32),
    )


def _named(limits: Mapping[str, int | None]) -> dict[str, int | None]:
    return {f"max_{part}_length": limits[part] for part in ("prompt", "response")}


def _comparisons(source: Any, argument: str, columns: Mapping[str, str]) -> list[Comparison] | None:
    if source is None:
        return None
    return [comparison(row, place, columns) for place, row in located_rows(source, argument, "prompt")]
