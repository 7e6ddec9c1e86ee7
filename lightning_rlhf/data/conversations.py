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
from lightning_rlhf.data.chats import ASSISTANT, chat_ids
from lightning_rlhf.data.fields import Fields
from lightning_rlhf.data.formats import Row
from lightning_rlhf.data.streaming import Stream
from lightning_rlhf.data.tokens import Tokenized, at, ended, pad_id, prompt_ids, response_ids, side_by_side

Conversations = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


class ConversationDataModule(RLHFDataModule):
    """Texts to imitate: whole ones, responses to prompts, or what the assistant says in conversations.

    Args:
        rows: Dicts with ``text``, of which everything is learnt; with ``prompt`` (a string or chat messages) and
            ``response`` (or ``completion``), of which the response is; or with ``messages``, of which every message of
            the assistant is (`docs/howto/data.md`). Plain strings are texts. Or the path of a JSONL, CSV or Parquet
            file of these, or a data set or stream of Hugging Face. EOS is put after every text and response that lacks
            it. May be left out where nothing is trained.
        validation: Rows of the same forms, for validation while training and for ``Trainer.validate``.
        test: Rows for ``Trainer.test``.
        batch_tokens: Tokens of a batch of the training data, per process, instead of ``batch_size`` rows: as many rows
            as fit in, padding not counted. Where the policy reads rows one behind the other (on a CPU) nothing is
            padded: what others call packing, without attention across documents. Which rows go together is drawn once,
            and the order of the batches every epoch.
        **kwargs: Passed to :class:`RLHFDataModule`: batch_size, columns, splits, duplicates, lengths, shuffle, seed,
            num_workers, cache_dir.

    Example:
        >>> ConversationDataModule([{"prompt": "Hi", "response": " there"}, "A text."]).rows
        [{'prompt': 'Hi', 'response': ' there'}, {'text': 'A text.'}]
    """

    argument = "rows"
    keys = ("text", "prompt", "response", "messages")
    text_key = "text"

    def __init__(
        self,
        rows: Conversations = None,
        *,
        validation: Conversations = None,
        test: Conversations = None,
        batch_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(rows, held_out={"validation": validation, "test": test}, **kwargs)
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"`batch_tokens={batch_tokens}` must be at least 1, or None for `batch_size` rows.")
        if batch_tokens is not None and isinstance(self.rows, Stream):
            raise ValueError(
                f"`batch_tokens={batch_tokens}` looks at all rows at once, which a stream has not: use `batch_size`."
            )
        self.batch_tokens = batch_tokens

    def parsed(self, row: Row, place: str) -> list[Row]:
        """A dict with ``text``, with ``prompt`` and ``response``, or with ``messages``."""
        fields = Fields(row, place, self.columns, self.keys)
        if fields.has("text"):
            return [{"text": fields.text("text")}]
        if fields.has("messages"):
            return [{"messages": fields.messages("messages")}]
        if fields.has("prompt", "response"):
            return [{"prompt": fields.prompt(), "response": fields.response()}]
        raise fields.lacks("'text', 'prompt' and 'response', or 'messages'")

    def texts(self, row: Row) -> list[Any]:
        """All of it; of a conversation what the assistant answers first is the prompt."""
        if "messages" not in row:
            return list(row.values())
        turns = [number for number, message in enumerate(row["messages"]) if message["role"] == ASSISTANT]
        begin = min(turns, default=0)
        return [row["messages"][:begin], row["messages"][begin:]]

    def tokenized(self, row: Row, what: str) -> Tokenized:
        """Tokens of the prompt and of what is learnt; of a text the first token is not, since nothing precedes it."""
        with at(what):
            if "messages" in row:
                return self._tokenized_chat(row)
            if "text" not in row:
                prompt = prompt_ids(row["prompt"], self.tokenizer, self.has_encoder)
                return Tokenized(prompt, [response_ids(row["response"], self.tokenizer, self.has_encoder)], row)
            if self.has_encoder:
                raise ValueError(
                    "`text` has no prompt, which the model's encoder would read: give 'prompt' and 'response'."
                )
            ids = prompt_ids(row["text"], self.tokenizer)
            return Tokenized(ids[:1], [ended(ids[1:], self.tokenizer)], row)

    def _tokenized_chat(self, row: Row) -> Tokenized:
        *before, last = row["messages"]
        if not self.has_encoder:
            ids, learnt = chat_ids(row["messages"], self.tokenizer)
            begin = learnt.index(True)
            return Tokenized(ids[:begin], [ids[begin:]], row, learnt[begin:])
        if not before or last["role"] != ASSISTANT or any(message["role"] == ASSISTANT for message in before):
            raise ValueError(
                "`messages` must end with the assistant's only message, since the model's encoder reads all that comes "
                "before it: give a row for each."
            )
        prompt = prompt_ids(before, self.tokenizer, has_encoder=True)
        return Tokenized(prompt, [response_ids(last["content"], self.tokenizer, has_encoder=True)], row)

    def binned(self, items: list[Tokenized]) -> list[list[Tokenized]] | None:
        """Rows that have ``batch_tokens`` tokens together, or some fewer."""
        if self.batch_tokens is None:
            return None
        lengths = [len(item.prompt) + item.longest for item in items]
        for item, length in zip(items, lengths, strict=True):
            if length > self.batch_tokens:
                raise ValueError(
                    f"{item.place} has {length} tokens, and `batch_tokens={self.batch_tokens}` holds no row of "
                    "that length: raise it, shorten the row or leave it out."
                )
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "bins"))
        order = torch.randperm(len(items), generator=generator).tolist() if self.shuffle else range(len(items))
        return [[items[i] for i in rows] for rows in first_fit(order, lengths, self.batch_tokens)]

    def collate(self, items: Sequence[Tokenized]) -> ImitationBatch:
        """Prompts padded left, responses padded right."""
        batch = ImitationBatch(**side_by_side(items, pad_id(self.tokenizer)))
        if any(item.learnt is not None for item in items):
            batch.learnt_mask = batch.response_mask.clone()
            for row, item in enumerate(items):
                if item.learnt is not None:
                    batch.learnt_mask[row, : len(item.learnt)] = torch.tensor(item.learnt)
        return batch
