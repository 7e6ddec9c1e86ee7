"""Reductions that count only what a mask says, and whitening built on them."""

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor


def masked_sum(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Sum of the entries that the mask counts; whatever the others hold, NaN included, changes nothing.

    Args:
        x: The numbers.
        mask: True where an entry counts.
        dim: The dimension to sum over; all of them by default.

    Returns:
        The sum, 0 where nothing counts.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    kept = torch.where(mask, x, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Mean of the entries that the mask counts, 0 where it counts none.

    Args:
        x: The numbers.
        mask: True where an entry counts.
        dim: The dimension to average over; all of them by default.

    Returns:
        The mean.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def moments(x: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None) -> Float64[Tensor, " 3"]:
    """Count, sum and sum of squares of the entries that the mask counts.

    They add up over micro-batches, iterations and processes, and :func:`mean_and_variance` reads them.

    Args:
        x: The numbers, of any type.
        mask: True where an entry counts; all do by default.

    Returns:
        The three moments, in double precision, without gradient.

    Example:
        >>> moments(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [3.0, 6.0, 14.0]
    """
    x = x.detach().double()
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    kept = torch.where(mask, x, 0.0)
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def mean_and_variance(
    moments: Float64[Tensor, "*batch 3"], ddof: int = 0
) -> tuple[Float64[Tensor, "*batch"], Float64[Tensor, "*batch"]]:
    """Mean and variance from the three moments that :func:`moments` gives.

    Args:
        moments: Count, sum and sum of squares.
        ddof: What is taken off the count in the variance's denominator: 0 for a population, 1 for a sample of it.

    Returns:
        Mean and variance; the mean of nothing is 0, and so is a variance with no degree of freedom.

    Example:
        >>> mean_and_variance(torch.tensor([3.0, 6.0, 14.0], dtype=torch.float64), ddof=1)
        (tensor(2., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    count, total, squares = moments.unbind(-1)
    mean = total / count.clamp(min=1.0)
    residual = (squares - total * mean).clamp(min=0.0)
    return mean, residual / (count - ddof).clamp(min=1.0)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    moments: Float64[Tensor, " 3"],
    center: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    r"""Scales to variance 1 and, unless told otherwise, shifts to mean 0.

    .. math:: (x - \mu) / \sqrt{\sigma^2 + \epsilon}

    Args:
        x: The numbers.
        mask: True where an entry counts; the others come out as 0.
        moments: Of the entries that count, on all processes: :func:`moments`, added up.
        center: Whether the mean is taken off.
        eps: Keeps the square root away from 0, :math:`\epsilon`.

    Returns:
        The whitened numbers.

    Example:
        >>> x, mask = torch.tensor([1.0, 3.0, 7.0]), torch.tensor([True, True, False])
        >>> whiten(x, mask, moments(x, mask))
        tensor([-1.,  1.,  0.])
    """
    mean, variance = mean_and_variance(moments)
    scaled = (x.double() - mean * center) * torch.rsqrt(variance + eps)
    return torch.where(mask, scaled, 0.0).to(x.dtype)
