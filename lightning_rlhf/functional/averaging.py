"""What a token counts in a loss: over tokens, over responses, or by a fixed length."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

Averaging = Literal["tokens", "responses", "length"]
"""How the terms of a minibatch are averaged."""


def token_weights(
    mask: Bool[Tensor, "batch response"], averaging: Averaging = "tokens", length: int | None = None
) -> Float[Tensor, "batch response"]:
    r"""Weight of every token before it is divided by the minibatch's count.

    With lengths :math:`n_i` a token weighs 1 over tokens, :math:`1 / n_i` over responses, and :math:`1 / L` by a fixed
    length, as in `Dr. GRPO <https://arxiv.org/abs/2503.20783>`_. Dividing by :func:`averaging_count`, summed over the
    whole minibatch, makes a weighted sum the mean: over all its tokens, or over its responses.

    Args:
        mask: True where a token counts.
        averaging: What the mean is taken over.
        length: The fixed length :math:`L`, in tokens; needed by ``"length"`` alone.

    Returns:
        The weights, 0 where the mask is False.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> token_weights(mask, "responses")
        tensor([[0.5000, 0.5000],
                [1.0000, 0.0000]])
    """
    weights = mask.float()
    if averaging == "responses":
        weights = weights / mask.sum(1, keepdim=True).clamp(min=1)
    elif averaging == "length":
        if length is None or length < 1:
            raise ValueError(f"`length={length}` must be a positive number of tokens with `averaging='length'`.")
        weights = weights / length
    return weights


def averaging_count(mask: Bool[Tensor, "batch response"], averaging: Averaging = "tokens") -> Float[Tensor, " batch"]:
    """What each response adds to the count that :func:`token_weights` are divided by.

    Args:
        mask: True where a token counts.
        averaging: What the mean is taken over.

    Returns:
        The number of its tokens, or 1; 0 for a response without a token that counts.

    Example:
        >>> import torch
        >>> averaging_count(torch.tensor([[True, True], [False, False]]), "responses")
        tensor([1., 0.])
    """
    return (mask.sum(1) if averaging == "tokens" else mask.any(1)).float()
