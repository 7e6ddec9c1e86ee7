"""Log-probs of response tokens and entropies: the only code that knows how logits are shifted."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable


def response_inputs(
    prompt: Shaped[Tensor, "batch prompt"], response: Shaped[Tensor, "batch response"]
) -> Shaped[Tensor, "batch joined"]:
    """Joins prompt and response into what a decoder-only model reads in order to predict the response.

    The state that predicts a token is the one before it: the last response token is not read, and the last
    ``response`` positions of the result are those whose logits and values belong to the response tokens, in order.

    Args:
        prompt: Tokens, or their mask; at least one column, padded left.
        response: Tokens, or their mask, padded right.

    Returns:
        Prompt and response side by side, prompt + response - 1 columns.

    Example:
        >>> response_inputs(torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]]))
        tensor([[1, 2, 3, 4]])
    """
    return torch.cat([prompt, response[:, :-1]], dim=1)


def response_logprobs(
    logits: Float[Tensor, "*shape vocabulary"],
    response_tokens: Int[Tensor, "*shape"],
    temperature: float = 1.0,
    chunk_size: int = 8192,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Log-probability of every response token, and entropy of the distribution that it was drawn from.

    .. math:: \log \pi(a_t | s_t), \qquad -\sum_a \pi(a | s_t) \log \pi(a | s_t)

    with :math:`\pi` the softmax of logits / temperature, computed in at least single precision and in chunks of the
    vocabulary: neither pass makes a full single-precision copy of half-precision logits.

    Args:
        logits: At the positions that predict the response, as :func:`response_inputs` gives them: entry ``t`` belongs
            to response token ``t``.
        response_tokens: What was written.
        temperature: What logits are divided by.
        chunk_size: How many tokens of the vocabulary are looked at at once.

    Returns:
        Log-probs and entropies in nats, both with gradients.

    Example:
        >>> logprobs, entropy = response_logprobs(torch.zeros(1, 4), torch.tensor([2]))
        >>> logprobs, entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """
    if not temperature > 0:
        raise ValueError(f"`temperature={temperature}` must be positive: logits are divided by it.")
    return _ResponseLogprobs.apply(logits, response_tokens, temperature, chunk_size)


class _ResponseLogprobs(torch.autograd.Function):
    """Softmax statistics by chunks of the vocabulary, twice: once forward, once for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, chunk_size: int) -> tuple[Tensor, Tensor]:
        peak = logits.amax(-1, keepdim=True).to(torch.promote_types(logits.dtype, torch.float32))
        total = torch.zeros_like(peak)
        weighted = torch.zeros_like(peak)
        for chunk in logits.split(chunk_size, dim=-1):
            shifted = (chunk.to(peak.dtype) - peak) / temperature
            mass = shifted.exp()
            total += mass.sum(-1, keepdim=True)
            weighted += _zero_where_impossible(mass, mass * shifted).sum(-1, keepdim=True)
        log_total = total.log()
        entropy = log_total - weighted / total
        logprobs = (logits.gather(-1, tokens[..., None]).to(peak.dtype) - peak) / temperature - log_total
        ctx.save_for_backward(logits, tokens, peak, log_total, entropy)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        return torch.squeeze_copy(logprobs, -1), torch.squeeze_copy(entropy, -1)  # no views, of which FSDP2 warns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        logits, tokens, peak, log_total, entropy = ctx.saved_tensors

        def gradient(part: Tensor, chosen: float) -> Tensor:
            logprobs = (part.to(peak.dtype) - peak) / ctx.temperature - log_total
            probs = logprobs.exp()
            total = torch.zeros_like(probs)
            if grad_logprobs is not None:
                total += grad_logprobs[..., None] * (chosen - probs)
            if grad_entropy is not None:
                total -= grad_entropy[..., None] * _zero_where_impossible(probs, probs * (logprobs + entropy))
            return (total / ctx.temperature).to(logits.dtype)

        chunks = [gradient(chunk, 0.0) for chunk in logits.split(ctx.chunk_size, dim=-1)]
        grad = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)
        grad.scatter_(-1, tokens[..., None], gradient(logits.gather(-1, tokens[..., None]), 1.0))
        return grad, None, None, None


def _zero_where_impossible(probs: Tensor, terms: Tensor) -> Tensor:
    """0 log 0 is 0: what cannot be drawn adds nothing, although its logit is minus infinity."""
    return torch.where(probs > 0, terms, 0.0)
