"""Policy-gradient objectives, per token and unreduced."""

import torch
from jaxtyping import Float
from torch import Tensor

ClipRange = float | tuple[float, float]
"""How far a ratio may move before its gradient stops: the same both ways, or (below 1, above 1)."""


def clip_bounds(clip_range: ClipRange | list[float] | tuple[float, ...]) -> tuple[float, float]:
    """How far a ratio may move below and above 1.

    Args:
        clip_range: One number for both ways, or two; a list, as files and checkpoints hold two, will do.

    Returns:
        Both numbers.

    Raises:
        ValueError: If it is another count of numbers, or one of them is negative.

    Example:
        >>> clip_bounds(0.2), clip_bounds([0.2, 0.28])
        ((0.2, 0.2), (0.2, 0.28))
    """
    bounds = clip_range if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
    if len(bounds) != 2 or not all(bound >= 0 for bound in bounds):
        raise ValueError(f"`clip_range={clip_range}` must be a number of at least 0, or two: below and above 1.")
    return bounds[0], bounds[1]


def clipped_surrogate(
    ratio: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    clip_range: ClipRange = 0.2,
    dual_clip: float | None = None,
) -> Float[Tensor, "*shape"]:
    r"""PPO's pessimistic objective, negated so that it is minimised.

    .. math:: -\min\bigl(\rho_t A_t,\ \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\, A_t\bigr)

    Eq. 7 of `Proximal Policy Optimization Algorithms <https://arxiv.org/abs/1707.06347>`_. Two numbers
    :math:`(\epsilon_\mathrm{low}, \epsilon_\mathrm{high})` clip asymmetrically, as in `DAPO
    <https://arxiv.org/abs/2503.14476>`_. A dual clip :math:`c > 1` bounds the objective from below by :math:`c A_t`
    where :math:`A_t < 0`, eq. 5 of `Mastering Complex Control in MOBA Games <https://arxiv.org/abs/1912.09729>`_.

    Args:
        ratio: Probability of each token under the policy over that under the policy that sampled it, :math:`\rho_t`.
        advantages: How much better each token did than expected, :math:`A_t`; no gradient flows through it.
        clip_range: How far the ratio may move before its gradient stops, :math:`\epsilon`.
        dual_clip: The bound :math:`c` on the ratio of bad tokens; none by default.

    Returns:
        The loss of every token; reduce it with :mod:`lightning_rlhf.functional.masked`.

    Example:
        >>> clipped_surrogate(torch.tensor([1.5, 1.5]), torch.tensor([1.0, -1.0]))
        tensor([-1.2000,  1.5000])
        >>> clipped_surrogate(torch.tensor([0.5, 9.0]), torch.tensor([-1.0, -1.0]), (0.2, 0.3), dual_clip=3.0)
        tensor([0.8000, 3.0000])
    """
    low, high = clip_bounds(clip_range)
    advantages = advantages.detach()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def outside_clip(ratio: Float[Tensor, "*shape"], clip_range: ClipRange) -> Float[Tensor, "*shape"]:
    """1 where a ratio lies outside the clip range, else 0; its mean is the clip fraction.

    Args:
        ratio: Probability of each token now over that when it was sampled.
        clip_range: As in :func:`clipped_surrogate`.

    Returns:
        The indicator of every token.

    Example:
        >>> outside_clip(torch.tensor([0.7, 0.9, 1.3]), (0.2, 0.4))
        tensor([1., 0., 0.])
    """
    low, high = clip_bounds(clip_range)
    return ((ratio < 1.0 - low) | (ratio > 1.0 + high)).to(ratio.dtype)
