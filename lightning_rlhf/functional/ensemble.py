"""One score of several: what an ensemble of rewards says."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Combination = Literal["mean", "min", "mean-std", "mean-variance"]
"""How the scores of an ensemble's members become one."""


def ensemble_score(
    scores: Float[Tensor, "members ..."], combine: Combination, coef: float = 0.0
) -> Float[Tensor, "..."]:
    r"""The mean of several scores, the lowest, or the mean less a price of their disagreement.

    .. math::

        \bar r = \frac{1}{k} \sum_i r_i, \qquad \min_i r_i, \qquad
        \bar r - \lambda\, \sigma, \qquad \bar r - \lambda\, \sigma^2, \qquad
        \sigma^2 = \frac{1}{k} \sum_i (r_i - \bar r)^2

    Mean, worst-case and uncertainty-weighted optimisation of `Reward Model Ensembles Help Mitigate Overoptimization
    <https://arxiv.org/abs/2310.02743>`_, whose penalty is the variance; the standard deviation is in the unit of the
    scores.

    Args:
        scores: Of every member, :math:`r_i`; NaN where it has nothing to say, which then does not count.
        combine: ``"mean"``, ``"min"``, ``"mean-std"`` or ``"mean-variance"``.
        coef: Of the disagreement, :math:`\lambda`.

    Returns:
        NaN where no member has anything to say.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> ensemble_score(scores, "min"), ensemble_score(scores, "mean-std", 0.5)
        (tensor([1., 2.]), tensor([1.5000, 2.0000]))
    """
    says = ~scores.isnan()
    count = says.sum(0)  # 0 / 0 below is NaN
    mean = torch.where(says, scores, 0.0).sum(0) / count
    if combine == "mean":
        return mean
    if combine == "min":
        return torch.where(count > 0, torch.where(says, scores, torch.inf).amin(0), torch.nan)
    variance = torch.where(says, (scores - mean).square(), 0.0).sum(0) / count
    return mean - coef * (variance.sqrt() if combine == "mean-std" else variance)
