"""Comparisons of responses, for reward models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from lightning_rlhf.batches import PreferenceBatch
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.comparisons import KEYS, Comparison, comparison
from lightning_rlhf.data.formats import Row
from lightning_rlhf.data.selection import Rows
from lightning_rlhf.data.tokens import Tokenized, at, pad_id, padded, prompt_ids, response_ids

Preferences = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


class PreferenceDataModule(RLHFDataModule):
    """Responses to prompts, and which of them people preferred.

    Args:
        preferences: Dicts with ``prompt`` (a string or chat messages), ``chosen`` and ``rejected``, and perhaps
            ``margin`` or ``tie``; with ``chosen`` and ``rejected`` alone, as transcripts or chat messages, whose common
            beginning is the prompt; with ``prompt``, ``responses`` and ``ranks`` or ``scores``; or with ``info``,
            ``summaries`` and ``choice``. Other keys are metadata. Or the path of a JSONL, CSV or Parquet file of these,
            or of the SQLite file of ``lightning-rlhf collect``, or a data set or stream of Hugging Face. May be left
            out where nothing is trained.
        validation: Rows of the same forms, for validation while training and for ``Trainer.validate``.
        test: Rows for ``Trainer.test``.
        predict: Rows for ``Trainer.predict``.
        **kwargs: Passed to :class:`RLHFDataModule`: batch_size (comparisons of a batch, per process), columns, splits,
            duplicates, lengths, shuffle, seed, num_workers, cache_dir.

    Example:
        >>> data = PreferenceDataModule([{"prompt": "Hi", "chosen": " there", "rejected": " you"}])
        >>> data.rows[0].responses
        (' there', ' you')
    """

    argument = "preferences"
    keys = KEYS

    def __init__(
        self,
        preferences: Preferences = None,
        *,
        validation: Preferences = None,
        test: Preferences = None,
        predict: Preferences = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(preferences, held_out={"validation": validation, "test": test, "predict": predict}, **kwargs)

    def parsed(self, row: Row, place: str) -> list[Comparison]:
        """What the row says."""
        return [comparison(row, place, self.columns)]

    def texts(self, row: Comparison) -> list[Any]:
        """The prompt, the responses, their places, and the margin."""
        return [row.prompt, row.responses, row.ranks, row.margin]

    def metadata(self, row: Comparison) -> Row:
        """Every other key."""
        return row.metadata

    def tokenized(self, row: Comparison, what: str) -> Tokenized:
        """Tokens of the prompt, and of every response."""
        with at(what):
            prompt = prompt_ids(row.prompt, self.tokenizer, self.has_encoder)
            return Tokenized(
                prompt, [response_ids(some, self.tokenizer, self.has_encoder) for some in row.responses], row
            )

    def collate(self, items: Sequence[Tokenized]) -> PreferenceBatch:
        """Prompts padded left, and the responses to each, padded right; a key that a row lacks is None."""
        prompts, responses = [item.prompt for item in items], [item.responses for item in items]
        batch = preference_batch(prompts, responses, pad_id(self.tokenizer), [item.row.ranks for item in items])
        batch.margins = torch.tensor([item.row.margin for item in items], dtype=torch.float32)
        batch.metadata = self.columns_of(items)
        return batch

    def _items(self, argument: str, rows: Rows) -> list[Tokenized]:
        """What fits; to be measured on, the longest first, so that alike rows lie side by side."""
        items = super()._items(argument, rows)
        if argument in ("validation", "test"):
            return sorted(items, key=lambda item: -len(item.prompt) - item.longest)
        return items


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
