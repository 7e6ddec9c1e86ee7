"""Log-probs of response tokens and entropies: the only code that knows how logits are shifted."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_rlhf.functional.running_softmax import RunningSoftmax, exponentials


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
    chunk_size: int = 2**19,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Log-probability of every response token, and entropy of the distribution that it was drawn from.

    .. math:: \log \pi(a_t | s_t), \qquad -\sum_a \pi(a | s_t) \log \pi(a | s_t)

    with :math:`\pi` the softmax of logits / temperature, computed in at least single precision and in chunks of tokens
    that stay in the cache. Of single-precision logits the softmax is kept for the gradient; of half-precision ones
    neither pass makes a full single-precision copy: the gradient computes it anew, chunk by chunk.

    Args:
        logits: At the positions that predict the response, as :func:`response_inputs` gives them: entry ``t`` belongs
            to response token ``t``.
        response_tokens: What was written.
        temperature: What logits are divided by.
        chunk_size: How many logits are looked at at once, but at least those of one token.

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


def logits_gradient(
    masses: Tensor,
    scale: Tensor,
    chosen: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor,
    keeps: bool,
) -> Tensor:
    """Gradient for logits over the temperature.

    Args:
        masses: (tokens, entries), the softmax at some entries of the vocabulary, but for a factor.
        scale: (tokens,), the factor.
        chosen: (tokens, 1), where among the entries the tokens are; any beyond them where they are not.
        grad_logprobs: (tokens, 1).
        grad_entropy: (tokens, 1), or None where it is 0.
        entropy: (tokens, 1).
        keeps: Whether ``masses`` stay what they are.

    Returns:
        (tokens, entries).
    """
    times = masses.mul if keeps else masses.mul_
    if grad_entropy is None:
        more, gradient = None, times(-grad_logprobs * scale[:, None])
    else:
        probs = times(scale[:, None])
        more = torch.xlogy(probs, probs).addcmul_(probs, entropy).mul_(grad_entropy)
        gradient = probs.mul_(-grad_logprobs)
    inside = (chosen >= 0) & (chosen < gradient.shape[-1])
    gradient.scatter_add_(-1, torch.where(inside, chosen, 0), torch.where(inside, grad_logprobs, 0.0))
    return gradient if more is None else gradient.sub_(more)


class _ResponseLogprobs(torch.autograd.Function):
    """Softmax statistics in chunks of tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, chunk_size: int) -> tuple[Tensor, Tensor]:
        flat, chosen = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        keeps = dtype == logits.dtype and ctx.needs_input_grad[0]
        masses = torch.empty_like(flat) if keeps else None
        seen = RunningSoftmax(chosen, temperature, dtype, chunk_size)
        seen.add(flat, 0, masses)
        outputs = seen.outputs(tokens.shape)
        ctx.save_for_backward(flat if masses is None else masses, chosen, outputs[1], seen.top, seen.mass)
        ctx.temperature, ctx.keeps, ctx.shape = temperature, keeps, logits.shape
        ctx.rows = max(1, chunk_size // logits.shape[-1])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        kept, chosen, entropy, top, mass = ctx.saved_tensors
        for_logprobs, for_entropy = token_gradients(entropy, grad_logprobs, grad_entropy, ctx.temperature)
        entropy, scale = entropy.reshape(-1, 1), mass.reciprocal()
        grad = torch.empty_like(kept)
        for start in range(0, len(kept), ctx.rows):
            part = slice(start, start + ctx.rows)
            some = kept[part] if ctx.keeps else exponentials(kept[part].to(mass.dtype), top[part], ctx.temperature)
            more = None if for_entropy is None else for_entropy[part]
            grad[part] = logits_gradient(
                some, scale[part], chosen[part, None], for_logprobs[part], more, entropy[part], ctx.keeps
            )
        return grad.view(ctx.shape), None, None, None


def token_gradients(
    entropy: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of what was returned for every token, as :func:`logits_gradient` wants them.

    Args:
        entropy: As it was returned.
        grad_logprobs: Of the log-probs; None is 0.
        grad_entropy: Of the entropy; None is 0.
        temperature: What logits were divided by.

    Returns:
        (tokens, 1) each; the second is None where it is 0 everywhere, as it is where entropy is only logged.
    """
    for_logprobs = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs
    for_entropy = None if grad_entropy is None or not bool(grad_entropy.any()) else grad_entropy
    for_entropy = None if for_entropy is None else for_entropy.reshape(-1, 1) / temperature
    return for_logprobs.reshape(-1, 1) / temperature, for_entropy
