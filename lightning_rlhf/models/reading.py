"""Prompts and responses in the form in which a decoder reads them: side by side with padding, or one behind the other.

Rows that lie one behind the other cost what their real tokens cost. Everything in a model but attention looks at single
tokens and does not mind; attention goes row by row, and a prompt that several rows share is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_rlhf.functional.logprobs import response_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "lightning_rlhf_rows"
"""Name of our attention function among those of transformers."""


class Responses(Protocol):
    """Prompts, padded left, and what was written after them, padded right."""

    prompt_tokens: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_tokens: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]


@dataclass(slots=True)
class Reading:
    """What a decoder reads, and which of its states predict what.

    Attributes:
        tokens: (1, total) one behind the other, or (batch, joined) with padding.
        positions: Of the tokens in their rows.
        mask: True where a token is real; or, one behind the other, :func:`rows_attention`'s (1, 1, segments, 2).
        keep: How many of the last columns predict something.
        targets: The tokens that are predicted; (1, predicted), or (batch, keep) where ``chosen`` is None.
        chosen: Which of the kept states, counted through all rows, predict these tokens; None for all.
        trunk: What the decoder's frozen blocks made of the tokens, where it was kept.
    """

    tokens: Int[Tensor, "rows columns"]
    positions: Int[Tensor, "rows columns"]
    mask: Tensor
    keep: int
    targets: Int[Tensor, ...]
    chosen: Int[Tensor, " predicted"] | None = None
    trunk: Float[Tensor, "rows columns width"] | None = None


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


def unpadded(batch: Responses, trunk: Tensor | None, shares: bool) -> Reading:
    """Rows one behind the other.

    Args:
        batch: Prompts and responses; no prompt is empty.
        trunk: Of the padded tokens, where it was kept.
        shares: Whether a prompt that is there several times is read once.

    Returns:
        The reading.
    """
    first = _first_with_prompt(batch) if shares else list(range(len(batch.prompt_tokens)))
    is_first = torch.tensor([i == j for i, j in enumerate(first)], device=batch.prompt_mask.device)
    prompt, response = batch.prompt_mask & is_first[:, None], batch.response_mask
    joined = torch.cat([prompt, response[:, 1:]], dim=1)  # token t of a response is read in order to predict t + 1
    source = joined.flatten().nonzero().squeeze(1)
    tokens = response_inputs(batch.prompt_tokens, batch.response_tokens).flatten()[source][None]
    positions = positions_of(response_inputs(batch.prompt_mask, response)).flatten()[source][None]

    place = (joined.flatten().long().cumsum(0) - 1).view(joined.shape)  # of every token in the line
    width = prompt.shape[1]
    place[:, width - 1] = place[:, width - 1][first]  # a prompt's last token predicts the response's first
    chosen = place[:, width - 1 :][response]
    mask = torch.tensor(_segments(batch, first), device=tokens.device)[None, None]
    kept = None if trunk is None else trunk.flatten(0, 1)[source][None]
    return Reading(tokens, positions, mask, tokens.shape[1], batch.response_tokens[response][None], chosen, kept)


def _first_with_prompt(batch: Responses) -> list[int]:
    """For each row, the first row that has its prompt."""
    seen: dict[tuple[int, ...], int] = {}
    prompts = torch.where(batch.prompt_mask, batch.prompt_tokens, -1).tolist()
    return [seen.setdefault(tuple(row), i) for i, row in enumerate(prompts)]


def _segments(batch: Responses, first: list[int]) -> list[list[int]]:
    """Length of each segment in the line, and the number of the segment that it looks back at too, or -1."""
    prompts = batch.prompt_mask.sum(1).tolist()
    responses = (batch.response_mask.sum(1) - 1).clamp(min=0).tolist()
    shared = {i for i, j in zip(range(len(first)), first, strict=True) if first.count(j) > 1} if first else set()
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


def rows_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads total width"],
    key: Float[Tensor, "1 keys total width"],
    value: Float[Tensor, "1 keys total width"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows that lie one behind the other; anything else goes to transformers' SDPA.

    Args:
        module: That attends.
        query: Of all rows.
        key: Of all rows.
        value: Of all rows.
        attention_mask: (1, 1, segments, 2) of integers: how long each segment is, and the number of the segment that it
            looks back at beside itself, or -1; any other mask, or None, is SDPA's.
        **kwargs: SDPA's, among them a layer's ``sliding_window``.

    Returns:
        (1, total, heads, width), and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    segments = attention_mask[0, 0].tolist()
    lengths = [length for length, _ in segments]
    window = kwargs.get("sliding_window")
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for i, (length, prefix) in enumerate(segments):
        if length == 0:
            continue
        k, v, before = keys[i], values[i], 0
        if prefix >= 0:
            before = lengths[prefix]
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        reaches = before + length
        is_plain = before == 0 and (window is None or length <= window)
        mask = None if is_plain else _band(before, length, reaches if window is None else window, query.dtype)
        mask = None if mask is None else mask.to(query.device)
        outputs.append(sdpa_attention_forward(module, queries[i], k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


@lru_cache(maxsize=512)
def _band(before: int, length: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a token looks, minus infinity elsewhere: back to those before its segment, but not beyond the window."""
    ages = torch.arange(before, before + length)[:, None] - torch.arange(before + length)
    hidden = (ages < 0) | (ages >= window)
    return torch.zeros(1, 1, length, before + length, dtype=dtype).masked_fill_(hidden, -torch.inf)


def install(model: PreTrainedModel) -> bool:
    """Lets a model call :func:`rows_attention` where it calls SDPA.

    Args:
        model: Whose config is changed; an export does not hold the name.

    Returns:
        Whether it asks transformers for its attention function at all, and would have asked for SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config
    if not getattr(model, "_supports_attention_backend", False) or config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(ATTENTION, rows_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config._attn_implementation = ATTENTION
    return True


def uninstall(model: PreTrainedModel) -> None:
    """Lets a model call SDPA again.

    Args:
        model: After :func:`install`.
    """
    model.config._attn_implementation = "sdpa"


def positions_of(mask: Bool[Tensor, "batch total"]) -> Int[Tensor, "batch total"]:
    """Numbers the real tokens of every row from 0; padding before them is at 0, and behind them where they end.

    Args:
        mask: True where a token is real.

    Returns:
        The positions.
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)
