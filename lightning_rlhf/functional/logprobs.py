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


class _ResponseLogprobs(torch.autograd.Function):
    """Softmax statistics in chunks of tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, chunk_size: int) -> tuple[Tensor, Tensor]:
        vocabulary = logits.shape[-1]
        flat, chosen = logits.reshape(-1, vocabulary), tokens.reshape(-1, 1)
        rows = max(1, chunk_size // vocabulary)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # In the shape in which they are returned: FSDP2 warns of outputs that are views.
        outputs = [torch.empty(tokens.shape, dtype=dtype, device=logits.device) for _ in range(2)]
        logprobs, entropy = (output.view(-1) for output in outputs)
        keeps_probs = dtype == logits.dtype and ctx.needs_input_grad[0]
        probs = torch.empty_like(flat) if keeps_probs else None
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            shifted = _shifted(flat[part], temperature)
            mass = shifted.softmax(-1)
            log_top = mass.amax(-1).log()  # of the likeliest token, whose shifted logit is 0
            logprobs[part] = shifted.gather(-1, chosen[part]).squeeze(-1) + log_top
            # 0 log 0 is 0: what cannot be drawn adds nothing, although its logit is minus infinity.
            finite = shifted.clamp_(min=torch.finfo(dtype).min)
            entropy[part] = -torch.linalg.vecdot(mass, finite) - log_top
            if probs is not None:
                probs[part] = mass
        ctx.save_for_backward(flat if probs is None else probs, chosen, outputs[1])
        ctx.temperature, ctx.rows, ctx.keeps_probs, ctx.shape = temperature, rows, keeps_probs, logits.shape
        ctx.set_materialize_grads(False)
        return outputs[0], outputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        kept, chosen, entropy = ctx.saved_tensors
        entropy = entropy.reshape(-1, 1)
        grad = torch.empty_like(kept)
        for start in range(0, len(kept), ctx.rows):
            part = slice(start, start + ctx.rows)
            probs = kept[part] if ctx.keeps_probs else _shifted(kept[part], ctx.temperature).softmax(-1)
            total = torch.zeros_like(probs[:, :1])
            if grad_logprobs is not None:
                total = grad_logprobs.reshape(-1, 1)[part] / ctx.temperature
            gradient = torch.mul(probs, -total, out=grad[part] if ctx.keeps_probs else None)
            gradient.scatter_add_(-1, chosen[part], total)
            if grad_entropy is not None:
                scale = grad_entropy.reshape(-1, 1)[part] / ctx.temperature
                gradient -= scale * (torch.xlogy(probs, probs) + probs * entropy[part])
            if not ctx.keeps_probs:
                grad[part] = gradient
        return grad.view(ctx.shape), None, None, None


def _shifted(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, in at least single precision, the largest of every row at 0."""
    shifted = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = shifted - shifted.amax(-1, keepdim=True)
    return shifted if temperature == 1.0 else shifted.div_(temperature)
