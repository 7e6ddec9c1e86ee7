"""From text to padded tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_rlhf.models.texts import ended, prompt_ids, response_ids

__all__ = ["Tokenized", "at", "ended", "pad_id", "padded", "prompt_ids", "response_ids"]


class Tokenized(NamedTuple):
    """A row in tokens.

    Attributes:
        prompt: Read once, whatever the number of responses.
        responses: Each with its EOS, unless it was cut.
        row: What they were made of.
        learnt: Which tokens of the only response are learnt, if not all.
        place: Where the row is from, for errors.
    """

    prompt: list[int]
    responses: list[list[int]]
    row: Any
    learnt: list[bool] | None = None
    place: str = ""

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses), default=0)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Says of an error where the row is from, whatever a tokenizer raises.

    Args:
        place: The words for it.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except Exception as error:  # a tokenizer in Rust has no kinds of errors
        raise ValueError(f"{place}: the tokenizer refuses its text ({type(error).__name__}: {error}).") from error


def pad_id(tokenizer: Any) -> int:
    """What fills rows; masks come from lengths, so it does not matter what it is."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def padded(
    rows: Sequence[Sequence[int]], pad: int, side: str
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Rows of different lengths as one tensor, and its mask.

    Args:
        rows: Tokens.
        pad: What fills them up.
        side: Where: ``"left"`` or ``"right"``.

    Returns:
        Tokens, and True where one is real.
    """
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = True
    return tokens, mask


def side_by_side(items: Sequence[Tokenized], pad: int) -> dict[str, Tensor]:
    """Prompts and their only responses, as a batch holds them.

    Args:
        items: Rows.
        pad: What fills them up.

    Returns:
        Tokens and masks by the names of a :class:`ResponseBatch`'s fields.
    """
    prompt_tokens, prompt_mask = padded([item.prompt for item in items], pad, "left")
    response_tokens, response_mask = padded([item.responses[0] for item in items], pad, "right")
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_mask": prompt_mask,
        "response_tokens": response_tokens,
        "response_mask": response_mask,
    }
