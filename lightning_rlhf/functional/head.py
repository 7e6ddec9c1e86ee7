"""Log-probs and entropies straight from the states that a vocabulary head reads."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_rlhf.functional.linear import product
from lightning_rlhf.functional.logprobs import logits_gradient, read_logits, token_gradients

LOGITS_AT_ONCE = 2**23
"""Logits that a product makes in the forward pass: 32 MiB in single precision, and at least those of 16 tokens."""
LOGITS_READ_AT_ONCE = 2**19
"""Logits that are looked at at once, which a processor's own cache holds."""
GRADIENTS_AT_ONCE = 2**21
"""Gradients of logits that are made at once in the backward pass, of all tokens at some entries of the vocabulary."""


def head_bytes(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype, trains: bool = True, kept_bytes: int = 2**30
) -> tuple[int, int, int]:
    """Memory that :func:`head_logprobs` takes beside states, weights and their gradients.

    Args:
        tokens: That are predicted.
        vocabulary: Entries of it.
        width: Of the states.
        dtype: Of the states.
        trains: Whether the head's weight does.
        kept_bytes: As there.

    Returns:
        Bytes of the softmax that lies between the passes, 0 where none does; and what is there beside it for a moment,
        in the forward pass some logits, in the backward pass the gradients of some and what these add to others.
    """
    wide = torch.promote_types(dtype, torch.float32)
    entries = min(vocabulary, _entries_at_once(tokens))
    some, narrow = tokens * entries * wide.itemsize, 0 if dtype == wide else tokens * entries * dtype.itemsize
    added = max(tokens, entries if trains else 0) * width * dtype.itemsize
    kept = tokens * vocabulary * dtype.itemsize if _is_kept(tokens, vocabulary, dtype, kept_bytes) else 0
    logits = min(tokens, rows_at_once(vocabulary)) * vocabulary * dtype.itemsize
    return kept, logits, max(2 * some, some + narrow + added)  # an entropy's gradient is as large as a log-prob's


def rows_at_once(vocabulary: int) -> int:
    """Tokens whose logits a product makes in the forward pass.

    Args:
        vocabulary: Entries of it.

    Returns:
        Their number.
    """
    return max(16, LOGITS_AT_ONCE // vocabulary)


def _entries_at_once(tokens: int) -> int:
    """Entries of the vocabulary for which gradients are made in the backward pass."""
    return max(1, GRADIENTS_AT_ONCE // max(1, tokens))


def _is_kept(tokens: int, vocabulary: int, dtype: torch.dtype, kept_bytes: int) -> bool:
    """Whether the softmax is kept for the backward pass."""
    is_wide = dtype == torch.promote_types(dtype, torch.float32)
    return is_wide and tokens * vocabulary * dtype.itemsize <= kept_bytes


def head_logprobs(
    states: Float[Tensor, "*shape width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    response_tokens: Int[Tensor, "*shape"],
    temperature: float = 1.0,
    kept_bytes: int = 2**30,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """What :func:`response_logprobs` says of ``states @ weight.T + bias``, without holding these logits.

    The forward pass goes over chunks of tokens, whose logits are read while they are in the cache; the backward pass
    goes over chunks of the vocabulary, whose gradients become those of weight and states at once. Between them lies the
    softmax, where it is in single precision and not too large; else it is computed anew, which costs a third more.

    Args:
        states: That predict the tokens.
        weight: Of the head.
        bias: Of the head, if it has one.
        response_tokens: What was written.
        temperature: What logits are divided by.
        kept_bytes: How large a softmax may be that is kept for the backward pass.

    Returns:
        Log-probs and entropies in nats, both with gradients, in at least single precision.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature={temperature}` must be positive: logits are divided by it.")
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight, bias = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _HeadLogprobs.apply(states, weight, bias, response_tokens, temperature, kept_bytes)


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
    ) -> tuple[Tensor, Tensor]:
        vocabulary = len(weight)
        flat, chosen = states.reshape(-1, states.shape[-1]), tokens.reshape(-1, 1)
        dtype = torch.promote_types(states.dtype, torch.float32)
        # In the shape in which they are returned: FSDP2 warns of outputs that are views.
        outputs = [torch.empty(tokens.shape, dtype=dtype, device=states.device) for _ in range(2)]
        logprobs, entropy = (output.view(-1) for output in outputs)
        is_kept = _is_kept(len(flat), vocabulary, states.dtype, kept_bytes)
        probs = flat.new_empty(len(flat), vocabulary) if is_kept and any(ctx.needs_input_grad) else None
        log_mass = torch.empty_like(logprobs)  # the logarithm of what a softmax divides by
        rows = rows_at_once(vocabulary)
        read = max(1, LOGITS_READ_AT_ONCE // vocabulary)
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            logits = product(flat[part], weight, bias)
            filled = None if probs is None else probs[part]
            read_logits(logits, chosen[part], temperature, read, logprobs[part], entropy[part], filled)
            log_mass[part] = logits.gather(1, chosen[part]).squeeze(1).to(dtype) / temperature - logprobs[part]
            del logits  # or they would be there while the next are made
        ctx.save_for_backward(flat, weight, bias, chosen, outputs[1], log_mass, probs)
        ctx.temperature, ctx.shape = temperature, states.shape
        ctx.set_materialize_grads(False)
        return outputs[0], outputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        flat, weight, bias, chosen, entropy, log_mass, probs = ctx.saved_tensors
        for_logprobs, for_entropy = token_gradients(entropy, grad_logprobs, grad_entropy, ctx.temperature)
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_states = torch.zeros_like(flat) if wants_states else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias else None
        entries = _entries_at_once(len(flat))
        for start in range(0, len(weight), entries):
            part = slice(start, start + entries)
            if probs is None:
                some = product(flat, weight[part], None if bias is None else bias[part]).to(log_mass.dtype)
                some.div_(ctx.temperature).sub_(log_mass[:, None]).exp_()
            else:
                some = probs[:, part].contiguous()
            gradient = logits_gradient(some, chosen - start, for_logprobs, for_entropy, entropy.reshape(-1, 1))
            gradient = gradient.to(flat.dtype)
            if grad_states is not None:
                grad_states += product(gradient, weight[part].t())
            if grad_weight is not None:
                grad_weight[part] = product(gradient.t(), flat.t())
            if grad_bias is not None:
                grad_bias[part] = gradient.sum(0)
            del some, gradient
        grad_states = None if grad_states is None else grad_states.view(ctx.shape)
        return grad_states, grad_weight, grad_bias, None, None, None
