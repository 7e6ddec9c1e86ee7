"""Prompts for online training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lightning_rlhf.batches import PromptBatch
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.formats import Row, read_rows
from lightning_rlhf.data.tokens import pad_id, padded, prompt_ids


class PromptDataModule(RLHFDataModule):
    """Prompts, and whatever else the reward wants to know about them.

    Args:
        prompts: Strings, lists of chat messages, or dicts with the key ``prompt``, whose other keys go to the reward;
            or the path of a JSONL file of any of these.
        batch_size: Prompts of an iteration, per process.
        shuffle: Whether every epoch has an order of its own.
        seed: Of the orders; what ``seed_everything`` set, else 0, by default.
        num_workers: Processes that collate.

    Example:
        >>> data = PromptDataModule([{"prompt": "2 + 2 =", "answer": "4"}], batch_size=1)
        >>> data.rows
        [{'prompt': '2 + 2 =', 'answer': '4'}]
    """

    def __init__(
        self,
        prompts: Sequence[Any] | str | os.PathLike[str],
        *,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        rows = read_rows(prompts, "prompts", "prompt")
        for number, row in enumerate(rows):
            if "prompt" not in row:
                raise ValueError(f"`prompts[{number}]` has no key 'prompt': it has {sorted(row)}.")
        super().__init__(rows, batch_size=batch_size, shuffle=shuffle, seed=seed, num_workers=num_workers)
        self.metadata_keys = sorted({key for row in rows for key in row} - {"prompt"})

    def tokenized(self, row: Row, number: int) -> tuple[list[int], Row]:
        """The prompt's tokens, and the row."""
        try:
            ids = prompt_ids(row["prompt"], self.tokenizer)
        except ValueError as error:
            raise ValueError(f"`prompts[{number}]`: {error}") from error
        self.check_length(len(ids), f"`prompts[{number}]`")
        return ids, row

    def collate(self, items: Sequence[tuple[list[int], Row]]) -> PromptBatch:
        """Prompts side by side, padded left; a key that a row lacks is None."""
        tokens, mask = padded([ids for ids, _ in items], pad_id(self.tokenizer), "left")
        return PromptBatch(
            prompt_tokens=tokens,
            prompt_mask=mask,
            prompts=[row["prompt"] for _, row in items],
            metadata={key: [row.get(key) for _, row in items] for key in self.metadata_keys},
        )
