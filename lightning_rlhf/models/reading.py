"""Prompts and responses in the form in which a decoder reads them: side by side with padding, or one behind the other.

Rows that lie one behind the other cost what their real tokens cost. Everything in a model but attention looks at single
tokens and does not mind; attention goes row by row, and a prompt that several rows share is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lightning_rlhf.functional.logprobs import response_inputs

MULTIPLE = 32
"""A long line is filled up to a multiple of so many tokens by some that nobody looks at: kernels are made for every
shape and kept, and a length of its own for every pass would cost time and memory."""


ROW = 2**22
"""What it costs a block to attend to a row by itself, in the unit of a token times the block's parameters."""
TOKEN = 2**17
"""What a token costs a block beside its parameters, in the same unit; both measured on a CPU, forward and backward."""


class Responses(Protocol):
    """Prompts, padded left, and what was written after them, padded right."""

    prompt_tokens: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_tokens: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]


@dataclass(slots=True)
class Source:
    """What an encoder reads.

    Attributes:
        tokens: Of the prompts, padded right.
        mask: True where a token is real.
        of_row: Which of them each row answers; None where every row has its own.
        states: What the encoder made of them, where it was kept.
    """

    tokens: Int[Tensor, "prompts prompt"]
    mask: Bool[Tensor, "prompts prompt"]
    of_row: Int[Tensor, " rows"] | None = None
    states: Float[Tensor, "prompts prompt width"] | None = None


@dataclass(slots=True)
class Reading:
    """What a decoder reads, and which of its states predict what.

    Attributes:
        tokens: (1, total) one behind the other, or (batch, joined) with padding.
        positions: Of the tokens in their rows.
        mask: True where a token is real; or, one behind the other, :func:`rows_attention`'s (1, 1, segments, 2), in
            host memory.
        keep: How many of the last columns predict something.
        targets: The tokens that are predicted; (1, predicted), or (batch, keep) where ``chosen`` is None.
        chosen: Which of the kept states, counted through all rows, predict these tokens; None for all.
        trunk: What the decoder's frozen blocks made of the tokens, where it was kept.
        source: What an encoder reads, where there is one.
    """

    tokens: Int[Tensor, "rows columns"]
    positions: Int[Tensor, "rows columns"]
    mask: Tensor
    keep: int
    targets: Int[Tensor, ...]
    chosen: Int[Tensor, " predicted"] | None = None
    trunk: Float[Tensor, "rows columns width"] | None = None
    source: Source | None = None


def padded(batch: Responses, trunk: Tensor | None, chooses: bool) -> Reading:
    """Rows side by side. What lies in the padding changes nothing.

    Args:
        batch: Prompts and responses.
        trunk: Of the tokens, where it was kept.
        chooses: Whether the head may be given single positions.

    Returns:
        The reading.
    """
    targets = torch.where(batch.response_mask, batch.response_tokens, 0)
    tokens = response_inputs(torch.where(batch.prompt_mask, batch.prompt_tokens, 0), targets)
    # Right padding comes after everything that counts, where a causal model does not look: it needs no mask. But
    # it must not be numbered: behind a long prompt the model may have no more positions.
    mask = response_inputs(batch.prompt_mask, torch.ones_like(batch.response_mask))
    positions = positions_of(response_inputs(batch.prompt_mask, batch.response_mask))
    keep = targets.shape[1]
    if not chooses:
        return Reading(tokens, positions, mask, keep, targets, None, trunk)
    # The head is as wide as the vocabulary: it reads no padding if it need not.
    chosen = batch.response_mask.flatten().nonzero().squeeze(1)
    return Reading(tokens, positions, mask, keep, targets.flatten()[chosen][None], chosen, trunk)


def unpadded(batch: Responses, trunk: Tensor | None, first: list[int]) -> Reading:
    """Rows one behind the other.

    Args:
        batch: Prompts and responses; no prompt is empty.
        trunk: Of the padded tokens, where it was kept.
        first: For each row, the one whose prompt it looks at, as :func:`first_with_prompt` says.

    Returns:
        The reading.
    """
    is_first = torch.tensor([i == j for i, j in enumerate(first)], device=batch.prompt_mask.device)
    prompt, response = batch.prompt_mask & is_first[:, None], batch.response_mask
    joined = torch.cat([prompt, response[:, 1:]], dim=1)  # token t of a response is read in order to predict t + 1
    source = joined.flatten().nonzero().squeeze(1)
    filler = -len(source) % MULTIPLE if len(source) >= 8 * MULTIPLE else 0
    source = torch.cat([source, source[:filler]])
    tokens = response_inputs(batch.prompt_tokens, batch.response_tokens).flatten()[source][None]
    positions = positions_of(response_inputs(batch.prompt_mask, response)).flatten()[source][None]

    place = (joined.flatten().long().cumsum(0) - 1).view(joined.shape)  # of every token in the line
    width = prompt.shape[1]
    place[:, width - 1] = place[:, width - 1][first]  # a prompt's last token predicts the response's first
    chosen = place[:, width - 1 :][response]
    segments = _segments(batch, first) + ([[filler, -1]] if filler else [])
    mask = torch.tensor(segments)[None, None]  # in host memory, where it is read
    kept = None if trunk is None else trunk.flatten(0, 1)[source][None]
    return Reading(tokens, positions, mask, tokens.shape[1], batch.response_tokens[response][None], chosen, kept)


def source_of(batch: Responses, states: Tensor | None, shares: bool) -> Source:
    """Prompts as an encoder reads them.

    Args:
        batch: Prompts and responses.
        states: What the encoder made of the prompts, padded as they are, where it was kept.
        shares: Whether a prompt that is there several times is read once.

    Returns:
        The prompts, padded right.
    """
    tokens = aligned(torch.where(batch.prompt_mask, batch.prompt_tokens, 0), batch.prompt_mask, "right")
    mask = aligned(batch.prompt_mask, batch.prompt_mask, "right")
    if states is not None:
        return Source(tokens, mask, None, aligned(states, batch.prompt_mask, "right"))
    first = first_with_prompt(batch, shares)
    numbers = {row: i for i, row in enumerate(dict.fromkeys(first))}
    if len(numbers) == len(first):
        return Source(tokens, mask)
    of_row = torch.tensor([numbers[row] for row in first], device=tokens.device)
    return Source(tokens[list(numbers)], mask[list(numbers)], of_row)


def aligned(values: Shaped[Tensor, "batch columns *width"], mask: Tensor, side: str) -> Tensor:
    """Rows whose padding is moved to a side, where it is 0.

    Args:
        values: With padding on either side.
        mask: (batch, columns), True where a value is real, padded on either side.
        side: On which the padding is to lie: ``"left"`` or ``"right"``.

    Returns:
        The rows.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)[None]
    length = mask.long().sum(1, keepdim=True)
    begins = mask.long().argmax(1, keepdim=True)  # at the first of the real ones
    start = 0 if side == "right" else mask.shape[1] - length
    index = (columns - start + begins).clamp(0, mask.shape[1] - 1)
    is_real = (columns >= start) & (columns < start + length)
    index, is_real = (x.view(*x.shape, *[1] * (values.dim() - 2)) for x in (index, is_real))
    return torch.where(is_real, values.gather(1, index.expand_as(values)), torch.zeros((), dtype=values.dtype))


def first_with_prompt(batch: Responses, shares: bool) -> list[int]:
    """For each row, the first row that has its prompt.

    Args:
        batch: Prompts and responses.
        shares: Whether a prompt that is there several times is read once; if not, each row is its own.

    Returns:
        Numbers of rows.
    """
    if not shares:
        return list(range(len(batch.prompt_tokens)))
    seen: dict[tuple[int, ...], int] = {}
    prompts = torch.where(batch.prompt_mask, batch.prompt_tokens, -1).tolist()
    return [seen.setdefault(tuple(row), i) for i, row in enumerate(prompts)]


def pays(batch: Responses, first: list[int], block_size: int) -> bool:
    """Whether rows in line cost less than padded ones: whether enough padding is saved for attending row by row.

    Args:
        batch: Prompts and responses.
        first: For each row, the one whose prompt it looks at.
        block_size: Parameters of a block.

    Returns:
        The answer.
    """
    columns = batch.prompt_mask.shape[1] + batch.response_mask.shape[1] - 1
    prompts = batch.prompt_mask.sum(1).tolist()
    read = sum(prompts[i] for i in set(first)) + int((batch.response_mask.sum(1) - 1).clamp(min=0).sum())
    return (len(first) * columns - read) * (block_size + TOKEN) >= len(first) * ROW


def _segments(batch: Responses, first: list[int]) -> list[list[int]]:
    """Length of each segment in the line, and the number of the segment that it looks back at too, or -1."""
    prompts = batch.prompt_mask.sum(1).tolist()
    responses = (batch.response_mask.sum(1) - 1).clamp(min=0).tolist()
    shared = {i for i, j in enumerate(first) if first.count(j) > 1}
    segments: list[list[int]] = []
    number: dict[int, int] = {}  # of the segment of a shared prompt
    for i, j in enumerate(first):
        if i not in shared:
            segments.append([prompts[i] + responses[i], -1])
            continue
        if i == j:
            number[i] = len(segments)
            segments.append([prompts[i], -1])
        segments.append([responses[i], number[j]])
    return segments


def pieces(
    batch: Responses, rows: Int[Tensor, " rows"], unpads: bool, size: int, tokens: int | None = None
) -> list[Int[Tensor, " rows"]]:
    """Splits rows into those of single passes.

    Args:
        batch: Whose rows they are.
        rows: Numbers of some of them.
        unpads: Whether padding costs nothing. Then the order is kept, in which those to one prompt lie together; else
            rows of alike responses go together.
        size: How many rows a pass takes at most.
        tokens: How many tokens it takes at most instead, padding included where it costs something; a longer row goes
            alone.

    Returns:
        Row numbers, pass by pass.
    """
    responses = batch.response_mask.sum(1)
    ordered = rows.sort().values if unpads else rows[responses[rows].argsort(stable=True)]
    if tokens is None:
        return list(ordered.split(size)) if len(rows) else []
    prompts = batch.prompt_mask.sum(1)
    lengths = list(zip(prompts[ordered].tolist(), responses[ordered].tolist(), strict=True))
    found: list[list[int]] = []
    total = longest_prompt = longest_response = 0
    for row, (prompt, response) in zip(ordered.tolist(), lengths, strict=True):
        total, longest_prompt = total + prompt + response, max(longest_prompt, prompt)
        longest_response = max(longest_response, response)
        padded_total = (len(found[-1]) + 1) * (longest_prompt + longest_response) if found else 0
        if not found or (total if unpads else padded_total) > tokens:
            found.append([])
            total, longest_prompt, longest_response = prompt + response, prompt, response
        found[-1].append(row)
    return [torch.tensor(piece, device=rows.device) for piece in found]


def positions_of(mask: Bool[Tensor, "batch total"]) -> Int[Tensor, "batch total"]:
    """Numbers the real tokens of every row from 0; padding before them is at 0, and behind them where they end.

    Args:
        mask: True where a token is real.

    Returns:
        The positions.
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)
