"""Prompts for online training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.batches import PromptBatch
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.formats import Row, is_chat, read_rows
from lightning_rlhf.data.tokens import pad_id, padded, prompt_ids

Prompts = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


class PromptDataModule(RLHFDataModule):
    """Prompts, and whatever else the reward wants to know about them.

    Args:
        prompts: Strings, lists of chat messages, or dicts with the key ``prompt``, whose other keys go to the reward;
            or the path of a JSONL, CSV or Parquet file of any of these. May be left out where nothing is trained.
        validation: Prompts of the same forms, for validation while training and for ``Trainer.validate``.
        test: Prompts for ``Trainer.test``.
        predict: Prompts for ``Trainer.predict``.
        batch_size: Prompts of an iteration, per process; also of a batch in evaluation.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the orders; what ``seed_everything`` set, else 0, by default.
        num_workers: Processes that collate.

    Example:
        >>> data = PromptDataModule([{"prompt": "2 + 2 =", "answer": "4"}], batch_size=1)
        >>> data.rows
        [{'prompt': '2 + 2 =', 'answer': '4'}]
    """

    argument = "prompts"

    def __init__(
        self,
        prompts: Prompts = None,
        *,
        validation: Prompts = None,
        test: Prompts = None,
        predict: Prompts = None,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        held_out = {"validation": validation, "test": test, "predict": predict}
        super().__init__(
            _prompt_rows(prompts, "prompts"),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            num_workers=num_workers,
            held_out={name: _prompt_rows(some, name) for name, some in held_out.items()},
        )
        rows = [row for some in (self.rows or [], *self.held_out.values()) for row in some]
        self.metadata_keys = sorted({key for row in rows for key in row} - {"prompt"})

    def tokenized(self, row: Row, what: str) -> tuple[list[int], Row]:
        """The prompt's tokens, and the row."""
        try:
            ids = prompt_ids(row["prompt"], self.tokenizer, self.has_encoder)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        self.check_length(len(ids), 0, what)
        return ids, row

    def collate(self, items: Sequence[tuple[list[int], Row]]) -> PromptBatch:
        """Prompts side by side, padded left; a key that a row lacks is None."""
        metadata = {key: [row.get(key) for _, row in items] for key in self.metadata_keys}
        return _batch([ids for ids, _ in items], [row["prompt"] for _, row in items], metadata, self.tokenizer)


def as_prompt_batch(batch: Any, tokenizer: Any, has_encoder: bool = False) -> Any:
    """Makes tokens of prompts that a loader yields as text.

    Args:
        batch: A list of strings or of chat messages, or a dict of lists with the key ``prompt``, whose other keys go to
            the reward, as torch collates rows; or anything else.
        tokenizer: Of the policy.
        has_encoder: Whether an encoder reads them.

    Returns:
        The prompts, ready to be answered; anything else as it is.
    """
    columns = dict(batch) if isinstance(batch, Mapping) and "prompt" in batch else {"prompt": batch}
    prompts = columns.pop("prompt")
    if not isinstance(prompts, list | tuple) or not all(isinstance(item, str) or is_chat(item) for item in prompts):
        return batch
    metadata = {key: values.tolist() if hasattr(values, "tolist") else list(values) for key, values in columns.items()}
    ids = [prompt_ids(prompt, tokenizer, has_encoder) for prompt in prompts]
    return _batch(ids, list(prompts), metadata, tokenizer)


def _batch(ids: list[list[int]], prompts: list[Any], metadata: dict[str, list[Any]], tokenizer: Any) -> PromptBatch:
    tokens, mask = padded(ids, pad_id(tokenizer), "left")
    return PromptBatch(prompt_tokens=tokens, prompt_mask=mask, prompts=prompts, metadata=metadata)


def _prompt_rows(source: Any, argument: str) -> list[Row] | None:
    if source is None:
        return None
    rows = read_rows(source, argument, "prompt")
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"`{argument}[{number}]` has no key 'prompt': it has {sorted(row)}.")
    return rows
