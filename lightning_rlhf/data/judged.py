"""Responses that were judged by themselves: good or not, or by a number."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_rlhf.batches import RewardedBatch, UnpairedPreferenceBatch
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.comparisons import KEYS as OF_PAIRS
from lightning_rlhf.data.comparisons import comparison
from lightning_rlhf.data.fields import Fields
from lightning_rlhf.data.formats import Row
from lightning_rlhf.data.tokens import Tokenized, at, pad_id, prompt_ids, response_ids, side_by_side

Judgements = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A response to a prompt, and what was said of it.

    Attributes:
        prompt: A string or chat messages.
        response: Text.
        judgement: 1 for good and 0 for not; or a score.
        metadata: Every other key of the row.
    """

    prompt: Any
    response: str
    judgement: float
    metadata: Row


class JudgedDataModule(RLHFDataModule):
    """Prompts, responses, and what was said of each response."""

    @abstractmethod
    def parsed(self, row: Row, place: str) -> list[Judged]:
        """What the row says."""

    def texts(self, row: Judged) -> list[Any]:
        """The prompt, the response, and what was said of it."""
        return [row.prompt, row.response, row.judgement]

    def metadata(self, row: Judged) -> Row:
        """Every other key."""
        return row.metadata

    def tokenized(self, row: Judged, what: str) -> Tokenized:
        """Tokens of the prompt, and of the response."""
        with at(what):
            prompt = prompt_ids(row.prompt, self.tokenizer, self.has_encoder)
            return Tokenized(prompt, [response_ids(row.response, self.tokenizer, self.has_encoder)], row)

    def collated(self, items: Sequence[Tokenized]) -> dict[str, Any]:
        """Prompts padded left, responses padded right, and metadata, by the names of a batch's fields.

        Args:
            items: One a row.

        Returns:
            What both kinds of batches hold.
        """
        return {**side_by_side(items, pad_id(self.tokenizer)), "metadata": self.columns_of(items)}


class UnpairedPreferenceDataModule(JudgedDataModule):
    """Responses to prompts, and whether each is as it should be.

    Args:
        preferences: Dicts with ``prompt`` (a string or chat messages), ``response`` (or ``completion``) and ``label``,
            true or false. Or pairs, in any form that :class:`PreferenceDataModule` reads: each becomes two rows, the
            chosen response's and the rejected one's. Other keys are metadata. Or the path of a JSONL, CSV or
            Parquet file of these, or a data set or stream of Hugging Face. May be left out where nothing is trained.
        validation: Rows of the same forms, for validation while training and for ``Trainer.validate``.
        test: Rows for ``Trainer.test``.
        predict: Rows for ``Trainer.predict``.
        **kwargs: Passed to :class:`RLHFDataModule`: batch_size (responses of a batch, per process), columns, splits,
            duplicates, lengths, shuffle, seed, num_workers, cache_dir.

    Example:
        >>> data = UnpairedPreferenceDataModule([{"prompt": "Hi", "chosen": " there", "rejected": " you"}])
        >>> [(row.response, row.judgement) for row in data.rows]
        [(' there', 1.0), (' you', 0.0)]
    """

    argument = "preferences"
    keys = tuple(dict.fromkeys(("prompt", "response", "label", *OF_PAIRS)))

    def __init__(
        self,
        preferences: Judgements = None,
        *,
        validation: Judgements = None,
        test: Judgements = None,
        predict: Judgements = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(preferences, held_out={"validation": validation, "test": test, "predict": predict}, **kwargs)

    def parsed(self, row: Row, place: str) -> list[Judged]:
        """One row of what was judged by itself, two of a pair."""
        fields = Fields(row, place, self.columns, self.keys)
        single = ("prompt", "response", "label")
        if fields.has(*single):
            judgement = float(fields.flag("label"))
            return [Judged(fields.prompt(), fields.response(), judgement, fields.but(*single))]
        if fields.has("label") or not (
            fields.has("chosen", "rejected") or fields.has("responses") or fields.has("info")
        ):
            raise fields.lacks(
                "'prompt', 'response' and 'label', or what a pair has ('prompt', 'chosen' and 'rejected')"
            )
        pair = comparison(row, place, self.columns)
        if len(pair.responses) > 2 or pair.ranks[0] == pair.ranks[1]:
            raise ValueError(
                f"{place} has {len(pair.responses)} responses with the ranks {list(pair.ranks)}: of two, one of which "
                "is better, it can be said that one is as it should be and one is not. Leave the row out, or label "
                "each response."
            )
        return [
            Judged(pair.prompt, response, judgement, pair.metadata)
            for response, judgement in zip(pair.responses, (1.0, 0.0), strict=True)
        ]

    def collate(self, items: Sequence[Tokenized]) -> UnpairedPreferenceBatch:
        """Rows side by side."""
        labels = torch.tensor([item.row.judgement > 0.5 for item in items])
        return UnpairedPreferenceBatch(**self.collated(items), labels=labels)


class RewardedDataModule(JudgedDataModule):
    """Responses to prompts, and what a reward gave for each.

    Args:
        samples: Dicts with ``prompt`` (a string or chat messages), ``response`` (or ``completion``) and ``score`` (or
            ``reward``), a number. Other keys are metadata. Or the path of a JSONL, CSV or Parquet file of these, or a
            data set or stream of Hugging Face. May be left out where nothing is trained.
        validation: Rows of the same forms, for validation while training and for ``Trainer.validate``.
        test: Rows for ``Trainer.test``.
        predict: Rows for ``Trainer.predict``.
        **kwargs: Passed to :class:`RLHFDataModule`: batch_size (responses of a batch, per process), columns, splits,
            duplicates, lengths, shuffle, seed, num_workers, cache_dir.

    Example:
        >>> RewardedDataModule([{"prompt": "Hi", "response": " there", "score": "0.5"}]).rows[0].judgement
        0.5
    """

    argument = "samples"
    keys = ("prompt", "response", "score")

    def __init__(
        self,
        samples: Judgements = None,
        *,
        validation: Judgements = None,
        test: Judgements = None,
        predict: Judgements = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(samples, held_out={"validation": validation, "test": test, "predict": predict}, **kwargs)

    def parsed(self, row: Row, place: str) -> list[Judged]:
        """What the row says."""
        fields = Fields(row, place, self.columns, self.keys)
        if not fields.has(*self.keys):
            raise fields.lacks("'prompt', 'response' and 'score'")
        return [Judged(fields.prompt(), fields.response(), fields.number("score"), fields.but(*self.keys))]

    def collate(self, items: Sequence[Tokenized]) -> RewardedBatch:
        """Rows side by side."""
        scores = torch.tensor([item.row.judgement for item in items], dtype=torch.float32)
        return RewardedBatch(**self.collated(items), scores=scores)
