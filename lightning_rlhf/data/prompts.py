"""Prompts for online training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.batches import PromptBatch
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.data.fields import Fields
from lightning_rlhf.data.formats import Row, is_chat
from lightning_rlhf.data.tokens import Tokenized, at, pad_id, padded, prompt_ids

Prompts = Sequence[Any] | str | os.PathLike[str] | None
"""A list, or the path of a file; the command line would make one string of a list, did it not come first."""


class PromptDataModule(RLHFDataModule):
    """Prompts, and whatever else the reward wants to know about them.

    Args:
        prompts: Strings, lists of chat messages, or dicts with the key ``prompt``, whose other keys go to the reward;
            or the path of a JSONL, CSV or Parquet file of any of these, or a data set or stream of Hugging Face. May be
            left out where nothing is trained.
        validation: Prompts of the same forms, for validation while training and for ``Trainer.validate``.
        test: Prompts for ``Trainer.test``.
        predict: Prompts for ``Trainer.predict``.
        **kwargs: Passed to :class:`RLHFDataModule`: batch_size (prompts of an iteration, per process), columns, splits,
            duplicates, lengths (rewards get a prompt that is cut as it was given), shuffle, seed, num_workers,
            cache_dir.

    Example:
        >>> data = PromptDataModule([{"prompt": "2 + 2 =", "answer": "4"}], batch_size=1)
        >>> data.rows
        [{'prompt': '2 + 2 =', 'answer': '4'}]
    """

    argument = "prompts"
    keys = ("prompt",)
    has_responses = False

    def __init__(
        self,
        prompts: Prompts = None,
        *,
        validation: Prompts = None,
        test: Prompts = None,
        predict: Prompts = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompts, held_out={"validation": validation, "test": test, "predict": predict}, **kwargs)

    def parsed(self, row: Row, place: str) -> list[Row]:
        """A dict with ``prompt`` and all other keys."""
        fields = Fields(row, place, self.columns, self.keys)
        name = fields.names["prompt"]
        if not fields.has("prompt"):
            raise ValueError(f"{place} has no key {name!r}: it has {sorted(map(str, row))}.")
        if name != "prompt" and "prompt" in row:
            raise ValueError(
                f"{place} has {name!r}, which `columns` says is the prompt, and 'prompt' beside it: rename or "
                "remove one."
            )
        return [{"prompt": fields.prompt(), **{str(key): value for key, value in row.items() if key != name}}]

    def texts(self, row: Row) -> list[Any]:
        """The prompt."""
        return [row["prompt"]]

    def metadata(self, row: Row) -> Row:
        """What goes to the reward."""
        return {key: value for key, value in row.items() if key != "prompt"}

    def tokenized(self, row: Row, what: str) -> Tokenized:
        """The prompt's tokens."""
        with at(what):
            return Tokenized(prompt_ids(row["prompt"], self.tokenizer, self.has_encoder), [], row)

    def collate(self, items: Sequence[Tokenized]) -> PromptBatch:
        """Prompts side by side, padded left; a key that a row lacks is None."""
        prompts = [item.row["prompt"] for item in items]
        return _batch([item.prompt for item in items], prompts, self.columns_of(items), self.tokenizer)


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
