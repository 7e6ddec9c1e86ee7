"""Texts to imitate, for supervised fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from lightning_rlhf.batches import ImitationBatch
from lightning_rlhf.chance import derived_seed
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.bins import first_fit
from lightning_rlhf.data.formats import Row, read_rows
from lightning_rlhf.data.tokens import ended, pad_id, padded, prompt_ids, response_ids

Conversations = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


class ConversationDataModule(RLHFDataModule):
    """Texts to imitate: whole ones, or responses to prompts.

    Args:
        rows: Dicts with ``text``, of which everything is learnt, or with ``prompt`` (a string or chat messages) and
            ``response``, of which the response is; plain strings are texts. Or the path of a JSONL, CSV or Parquet
            file of these. EOS is put after every text and response that lacks it. May be left out where
            nothing is trained.
        validation: Rows of the same forms, for validation while training and for ``Trainer.validate``.
        test: Rows for ``Trainer.test``.
        batch_size: Rows of a batch, per process.
        batch_tokens: Tokens of a batch of the training data instead, per process: as many rows as fit in, padding not
            counted. Where the policy reads rows one behind the other (on a CPU) nothing is padded: what others call
            packing, without attention across documents. Which rows go together is drawn once, and the order of the
            batches every epoch.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the orders; what ``seed_everything`` set, else 0, by default.
        num_workers: Processes that collate.

    Example:
        >>> ConversationDataModule([{"prompt": "Hi", "response": " there"}, "A text."]).rows
        [{'prompt': 'Hi', 'response': ' there'}, {'text': 'A text.'}]
    """

    argument = "rows"

    def __init__(
        self,
        rows: Conversations = None,
        *,
        validation: Conversations = None,
        test: Conversations = None,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            _conversations(rows, "rows"),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            num_workers=num_workers,
            held_out={"validation": _conversations(validation, "validation"), "test": _conversations(test, "test")},
        )
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"`batch_tokens={batch_tokens}` must be at least 1, or None for `batch_size` rows.")
        self.batch_tokens = batch_tokens

    def binned(self, items: list[tuple[list[int], list[int]]]) -> list[list[tuple[list[int], list[int]]]] | None:
        """Rows that have ``batch_tokens`` tokens together, or some fewer."""
        if self.batch_tokens is None:
            return None
        lengths = [len(prompt) + len(response) for prompt, response in items]
        for number, length in enumerate(lengths):
            if length > self.batch_tokens:
                raise ValueError(
                    f"`rows[{number}]` has {length} tokens, and `batch_tokens={self.batch_tokens}` holds no row of "
                    "that length: raise it, shorten the row or leave it out."
                )
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "bins"))
        order = torch.randperm(len(items), generator=generator).tolist() if self.shuffle else range(len(items))
        return [[items[i] for i in rows] for rows in first_fit(order, lengths, self.batch_tokens)]

    def tokenized(self, row: Row, what: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of what is learnt; of a text the first token is not, since nothing precedes it."""
        try:
            if "text" in row:
                if self.has_encoder:
                    raise ValueError(
                        "`text` has no prompt, which the model's encoder would read: give 'prompt' and 'response'."
                    )
                ids = prompt_ids(row["text"], self.tokenizer)
                prompt, response = ids[:1], ended(ids[1:], self.tokenizer)
            else:
                prompt = prompt_ids(row["prompt"], self.tokenizer, self.has_encoder)
                response = response_ids(row["response"], self.tokenizer, self.has_encoder)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        self.check_length(len(prompt), len(response), what)
        return prompt, response

    def collate(self, items: Sequence[tuple[list[int], list[int]]]) -> ImitationBatch:
        """Prompts padded left, responses padded right."""
        pad = pad_id(self.tokenizer)
        prompt_tokens, prompt_mask = padded([prompt for prompt, _ in items], pad, "left")
        response_tokens, response_mask = padded([response for _, response in items], pad, "right")
        return ImitationBatch(
            prompt_tokens=prompt_tokens,
            prompt_mask=prompt_mask,
            response_tokens=response_tokens,
            response_mask=response_mask,
        )


def _conversations(source: Any, argument: str) -> list[Row] | None:
    if source is None:
        return None
    rows = read_rows(source, argument, "text")
    for number, row in enumerate(rows):
        if not ("text" in row or {"prompt", "response"} <= set(row)):
            raise ValueError(
                f"`{argument}[{number}]` has the keys {sorted(row)}: it needs 'text', or 'prompt' and 'response'."
            )
    return rows
