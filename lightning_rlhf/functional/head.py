"""Log-probs and entropies straight from the states that a vocabulary head reads."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_rlhf.functional.linear import product, product_into
from lightning_rlhf.functional.logprobs import logits_gradient, token_gradients
from lightning_rlhf.functional.running_softmax import RunningSoftmax, exponentials
from lightning_rlhf.functional.spare import Spare

LOGITS_AT_ONCE = 2**23
"""Logits that are made at once where all of a token's are wanted: 32 MiB in single precision, at least 16 tokens'."""
TILE = 2**21
"""Logits of all tokens at some entries of the vocabulary, or their gradients, that are made at once: 8 MiB in single
precision."""
READ_AT_ONCE = 2**19
"""Logits of a tile that are looked at at once, which a processor's own cache holds."""
GPU_TILE = 2**26
"""The same on a GPU, where memory is as fast as it gets and every kernel costs its start: 256 MiB."""
GPU_READ_AT_ONCE = 2**24
"""Likewise."""
GPU_ROWS = 64
"""Rows and entries of a product there are multiples of so many."""
NARROWEST = 256
"""Entries of the vocabulary that a product has at least, however many tokens there are."""


def head_bytes(
    tokens: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    *,
    trains: bool = True,
    learns: bool = True,
    kept_bytes: int = 2**30,
    is_gpu: bool = False,
) -> tuple[int, int, int]:
    """Memory that :func:`head_logprobs` takes beside states, weights and their gradients.

    Args:
        tokens: That are predicted.
        vocabulary: Entries of it.
        width: Of the states.
        dtype: Of the states.
        trains: Whether the head's weight does.
        learns: Whether anything does, so that there is a backward pass.
        kept_bytes: As there.
        is_gpu: Whether it runs on one.

    Returns:
        Bytes of the exponentials that lie between the passes, 0 where none do; and what is there beside them for a
        moment: in the forward pass some logits, in the backward pass gradients of some and what they add to others.
    """
    wide = torch.promote_types(dtype, torch.float32)
    entries, at_once = _entries_at_once(tokens, vocabulary, is_gpu), GPU_READ_AT_ONCE if is_gpu else READ_AT_ONCE
    some, narrow = tokens * entries * wide.itemsize, 0 if dtype == wide else tokens * entries * dtype.itemsize
    added = max(tokens, entries if trains else 0) * width * dtype.itemsize
    summed = 0 if dtype == wide else tokens * width * wide.itemsize
    keeps = learns and _is_kept(tokens, vocabulary, dtype, kept_bytes)
    read = min(tokens, max(1, at_once // entries)) * entries * wide.itemsize
    held = tokens * (vocabulary if keeps else entries) * dtype.itemsize
    looked_at = (1 if keeps else 2 if dtype == wide else 3) * read
    return (
        held if keeps else 0,
        looked_at if keeps else held + looked_at,
        summed + max(2 * some, some + narrow + added),
    )  # an entropy's gradient is as large as a log-prob's


def rows_at_once(vocabulary: int) -> int:
    """Tokens whose logits are made at once where all of a token's are wanted.

    Args:
        vocabulary: Entries of it.

    Returns:
        Their number.
    """
    return max(16, LOGITS_AT_ONCE // vocabulary)


def _entries_at_once(tokens: int, vocabulary: int, is_gpu: bool) -> int:
    """Entries of the vocabulary for which logits of all tokens, or their gradients, are made at once."""
    entries = max(NARROWEST, (GPU_TILE if is_gpu else TILE) // max(1, tokens))
    return min(vocabulary, entries - entries % GPU_ROWS if is_gpu and entries > GPU_ROWS else entries)


def _is_kept(tokens: int, vocabulary: int, dtype: torch.dtype, kept_bytes: int) -> bool:
    """Whether exponentials are kept for the backward pass."""
    is_wide = dtype == torch.promote_types(dtype, torch.float32)
    return is_wide and tokens * vocabulary * dtype.itemsize <= kept_bytes


def _tile(kept: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """What is kept of all tokens, ``shape[0]``, at ``shape[1]`` entries from ``start`` on."""
    return kept[shape[0] * start :][: shape[0] * shape[1]].view(*shape)


def head_logprobs(
    states: Float[Tensor, "*shape width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    response_tokens: Int[Tensor, "*shape"],
    temperature: float = 1.0,
    kept_bytes: int = 2**30,
    spare: Spare | None = None,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """What :func:`response_logprobs` says of ``states @ weight.T + bias``, without holding these logits.

    Both passes go over tiles: all tokens, at some entries of the vocabulary. The forward pass reads the logits of a
    tile while they are in the cache (:class:`RunningSoftmax`), the backward pass makes their gradients, which become
    those of weight and states at once. Between them lie exponentials of the logits, where they are in single precision
    and not too large; else they are computed anew, which costs a third more.

    Args:
        states: That predict the tokens.
        weight: Of the head.
        bias: Of the head, if it has one.
        response_tokens: What was written.
        temperature: What logits are divided by.
        kept_bytes: How large exponentials may be that are kept for the backward pass.
        spare: Has memory for exponentials, ``"exponentials"``, and for the weight's gradient, ``"gradient"``; the
            former come back to it.

    Returns:
        Log-probs and entropies in nats, both with gradients, in at least single precision.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature={temperature}` must be positive: logits are divided by it.")
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight, bias = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    count = response_tokens.numel()
    if states.is_cuda and count % GPU_ROWS:
        # The products of a GPU are several times slower where rows do not begin at multiples of 16 bytes.
        rows = nn.functional.pad(states.reshape(count, -1), (0, 0, 0, -count % GPU_ROWS))
        tokens = nn.functional.pad(response_tokens.reshape(-1), (0, -count % GPU_ROWS))
        said = _HeadLogprobs.apply(rows, weight, bias, tokens, temperature, kept_bytes, spare)
        return said[0][:count].view(response_tokens.shape), said[1][:count].view(response_tokens.shape)
    return _HeadLogprobs.apply(states, weight, bias, response_tokens, temperature, kept_bytes, spare)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        kept_bytes: int,
        spare: Spare | None,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = len(weight)
        flat, chosen = states.reshape(-1, states.shape[-1]), tokens.reshape(-1)
        dtype = torch.promote_types(states.dtype, torch.float32)
        keeps = _is_kept(len(flat), vocabulary, states.dtype, kept_bytes) and any(ctx.needs_input_grad)
        entries = _entries_at_once(len(flat), vocabulary, flat.is_cuda)
        seen = RunningSoftmax(chosen, temperature, dtype, GPU_READ_AT_ONCE if flat.is_cuda else READ_AT_ONCE)
        spare = Spare() if spare is None else spare
        # Exponentials, tile by tile.
        kept = spare.take("exponentials", [len(flat) * vocabulary], flat) if keeps else None
        tops = []  # of every tile what was subtracted before
        for start in range(0, vocabulary, entries):
            part = slice(start, start + entries)
            logits = product(flat, weight[part], None if bias is None else bias[part])
            seen.add(logits, start, None if kept is None else _tile(kept, logits.shape, start))
            tops.append(seen.top)
            del logits  # or they would be there while the next are made
        outputs = seen.outputs(tokens.shape)
        ctx.save_for_backward(flat, weight, bias, chosen, outputs[1], seen.mass, *tops)
        ctx.temperature, ctx.shape, ctx.kept, ctx.spare = temperature, states.shape, kept, spare
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        flat, weight, bias, chosen, entropy, mass, *tops = ctx.saved_tensors
        kept = ctx.kept
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.kept = None
        for_logprobs, for_entropy = token_gradients(entropy, grad_logprobs, grad_entropy, ctx.temperature)
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # Of many tiles: in half precision their sum would lose what the last ones add.
        grad_states = torch.zeros_like(flat, dtype=mass.dtype) if wants_states else None
        grad_weight = ctx.spare.take("gradient", weight.shape, weight) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias else None
        entries = _entries_at_once(len(flat), len(weight), flat.is_cuda)
        reads_kept = kept is not None and for_entropy is None
        for start, top in zip(range(0, len(weight), entries), tops, strict=True):
            part = slice(start, start + entries)
            if kept is not None:
                some = _tile(kept, (len(flat), len(weight[part])), start)
                scale = (top - tops[-1]).exp_().div_(mass)
            if reads_kept:  # as they are: products are scaled, which are smaller
                rate = scale[:, None] * -for_logprobs
                if grad_states is not None:
                    grad_states.addcmul_(product(some, weight[part].t()), rate)
                if grad_weight is not None:
                    product_into(grad_weight[part], some.t(), (rate * flat).t())
                if grad_bias is not None:
                    grad_bias[part] = some.t() @ rate.squeeze(1)
                del some
                continue
            if kept is None:
                some = product(flat, weight[part], None if bias is None else bias[part]).to(mass.dtype)
                some = exponentials(some, tops[-1], ctx.temperature)
                scale = mass.reciprocal()
            gradient = logits_gradient(
                some,
                scale,
                chosen[:, None] - start,
                for_logprobs,
                for_entropy,
                entropy.reshape(-1, 1),
                kept is not None,
            ).to(flat.dtype)
            if grad_states is not None:
                grad_states += product(gradient, weight[part].t())
            if grad_weight is not None:
                product_into(grad_weight[part], gradient.t(), flat.t())
            if grad_bias is not None:
                grad_bias[part] = gradient.sum(0)
            del some, gradient
        if reads_kept:  # and what the tokens themselves add
            if grad_states is not None:
                grad_states.addcmul_(weight[chosen], for_logprobs)
            if grad_weight is not None:
                grad_weight.index_add_(0, chosen, for_logprobs * flat)
            if grad_bias is not None:
                grad_bias.index_add_(0, chosen, for_logprobs.squeeze(1))
        grad_states = None if grad_states is None else grad_states.to(flat.dtype).view(ctx.shape)
        if kept is not None:
            piece = kept.untyped_storage()
            del kept
            ctx.spare.give("exponentials", piece)
        return grad_states, grad_weight, grad_bias, None, None, None, None
