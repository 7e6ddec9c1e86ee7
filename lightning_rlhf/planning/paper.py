"""What is held of vocabularies and caches, whose numbers are too many to be gone through without computing them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.functional.head import head_bytes
from lightning_rlhf.functional.spare import SMALLEST
from lightning_rlhf.models.cache import RoomyLayer, columns_at
from lightning_rlhf.models.fixed_cache import FixedCache
from lightning_rlhf.planning.live import Live

ACTIVATIONS, LOGITS, CACHE, GRADIENTS = "activations", "logits", "cache", "gradients"
PACKED = "packed weights"


class HeadOnPaper(torch.autograd.Function):
    """Allocates what :func:`head_logprobs` does, in as few operators as it takes."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, live: Live, spare: list[Tensor] | None
    ) -> Tensor:
        """Returns a number for each state, in the place of its log-prob; ``spare`` is None on a GPU."""
        tokens, (vocabulary, width) = states.shape[:-1].numel(), weight.shape
        learns, trains = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        kept, logits, ctx.at_once = head_bytes(
            tokens, vocabulary, width, states.dtype, trains=trains, learns=learns, is_gpu=spare is None
        )
        with live.labelled(LOGITS):
            softmax = _memory(kept)
            _moment(logits)
        ctx.save_for_backward(states, weight, bias, softmax)
        ctx.live, ctx.spare = live, spare
        return states.new_zeros(*states.shape[:-1], 1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Makes gradients of states and weights."""
        *inputs, softmax = ctx.saved_tensors
        if ctx.spare is not None and softmax.nbytes >= SMALLEST:
            ctx.spare[:] = [softmax]  # for the next pass
        grad_states = torch.zeros_like(inputs[0]) if ctx.needs_input_grad[0] else None
        with ctx.live.labelled(GRADIENTS):
            wanted = zip(inputs[1:], ctx.needs_input_grad[1:3], strict=True)
            grads = [torch.empty_like(tensor) if wants else None for tensor, wants in wanted]
        with ctx.live.labelled(LOGITS):
            _moment(ctx.at_once)
        return grad_states, *grads, None, None


class SoftmaxOnPaper(torch.autograd.Function):
    """Allocates what :func:`response_logprobs` does with logits that are there as a whole."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, live: Live) -> Tensor:
        """Returns a number for each row of logits, in the place of its log-prob."""
        is_wide = logits.dtype == torch.promote_types(logits.dtype, torch.float32)
        live.relabel(logits, LOGITS)
        with live.labelled(LOGITS):
            kept = torch.empty_like(logits) if is_wide and ctx.needs_input_grad[0] else logits
        ctx.save_for_backward(kept)
        ctx.live = live
        return logits.new_zeros(*logits.shape[:-1], 1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Makes the gradient of all logits."""
        with ctx.live.labelled(LOGITS):
            return torch.empty_like(ctx.saved_tensors[0]), None


def _memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _moment(size: int) -> None:
    """Takes memory and gives it back."""
    _memory(size)


def hold(live: Live, cache: Any) -> None:
    """Says of what a cache holds that it is the cache.

    Args:
        live: That has seen it made.
        cache: As a decoder returns it; None holds nothing.
    """
    for tensor in _tensors(cache):
        live.relabel(tensor, CACHE)


def longest(cache: Any, read: int, last: int) -> int:
    """What a cache takes once the last token was read.

    Args:
        cache: That has read a token more than at first.
        read: Tokens that it had read at first.
        last: Tokens that it will have read.

    Returns:
        The bytes.
    """
    rooms = read
    for total in range(read + 1, last + 1):
        rooms = columns_at(total) if total > rooms else rooms
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))
    for layer in _growing(cache):
        held = sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))
        columns = layer.keys.shape[-2]
        window = getattr(layer, "sliding_window", None) or last
        end = rooms if isinstance(layer, RoomyLayer) else min(last, window)
        size += held * end // columns - held
    return size


def fixed(cache: Any, columns: int) -> int:
    """What a cache takes that has so many columns, filled or not.

    Args:
        cache: That grows instead.
        columns: Tokens of a text that there is room for.

    Returns:
        The bytes; 0 where no steps can be recorded on such a one.
    """
    if not FixedCache.can_hold(cache):
        return 0
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() // tensor.shape[-2] * columns * tensor.element_size() for tensor in tensors)


def _growing(cache: Any) -> list[Any]:
    """The layers that get longer with every token."""
    past = getattr(cache, "past", cache)
    past = getattr(past, "self_attention_cache", past)
    return [layer for layer in getattr(past, "layers", []) if getattr(layer, "keys", None) is not None]


def _tensors(cache: Any) -> Iterator[Tensor]:
    """All tensors of a cache: keys and values, whatever else a layer holds, and what an encoder made of prompts."""
    if isinstance(states := getattr(cache, "states", None), Tensor):
        yield states
    past = getattr(cache, "past", cache)
    for half in (past, getattr(past, "self_attention_cache", None), getattr(past, "cross_attention_cache", None)):
        for layer in getattr(half, "layers", []):
            yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
