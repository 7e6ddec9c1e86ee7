"""Objectives on comparisons of responses, one term per comparison and unreduced."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from lightning_rlhf.functional.masked import masked_sum


def bradley_terry(
    difference: Float[Tensor, "*shape"], margin: Float[Tensor, "*shape"] | float = 0.0, label_smoothing: float = 0.0
) -> Float[Tensor, "*shape"]:
    r"""Negative log-likelihood of the preferred response winning, from the difference of two scores.

    .. math:: -(1 - \epsilon) \log \sigma(d - m) - \epsilon \log \sigma(-d - m), \qquad d = r_w - r_l

    Bradley and Terry (1952), as in eq. 1 of `Training language models to follow instructions
    <https://arxiv.org/abs/2203.02155>`_; the margin is that of eq. 2 of `Llama 2 <https://arxiv.org/abs/2307.09288>`_.

    Args:
        difference: Score of the preferred response less that of the other, :math:`d`.
        margin: How much better it was judged to be, :math:`m`.
        label_smoothing: Share of the comparisons that are believed to be the wrong way round, :math:`\epsilon`.

    Returns:
        The loss of every comparison.

    Example:
        >>> bradley_terry(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 1.0]))
        tensor([0.6931, 0.1269, 0.3133])
    """
    loss = softplus(margin - difference)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * softplus(margin + difference)
    return loss


def rao_kupper_tie(difference: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    r"""Negative log-likelihood of a tie, where differences below a threshold go unnoticed.

    .. math:: -\log \bigl[(e^{2\eta} - 1)\, \sigma(d - \eta)\, \sigma(-d - \eta)\bigr]

    `Rao and Kupper (1967) <https://doi.org/10.1080/01621459.1967.10482901>`_, with :math:`\theta = e^\eta`. The
    probability of winning is then :math:`\sigma(d - \eta)`: :func:`bradley_terry` with :math:`\eta` as the margin. Of
    two equally good responses a share of :math:`\tanh(\eta / 2)` ties.

    Args:
        difference: Of the two scores, either way round, :math:`d`.
        threshold: More than 0, :math:`\eta`.

    Returns:
        The loss of every tie.

    Example:
        >>> rao_kupper_tie(torch.tensor([0.0, 2.0]), math.log(3.0)).exp()  # one in two, and rarer
        tensor([2.0000, 4.0716])
    """
    certain = 2.0 * threshold + math.log(-math.expm1(-2.0 * threshold))
    return softplus(threshold - difference) + softplus(threshold + difference) - certain


def plackett_luce(
    scores: Float[Tensor, "batch responses"],
    ranks: Int[Tensor, "batch responses"],
    mask: Bool[Tensor, "batch responses"],
) -> Float[Tensor, " batch"]:
    r"""Negative log-likelihood of a ranking: the best response is drawn first, then the best of the rest, and so on.

    .. math:: -\sum_i \Bigl[r_i - \log \sum_{j:\, \mathrm{rank}_j \ge \mathrm{rank}_i} e^{r_j}\Bigr]

    `Plackett (1975) <https://doi.org/10.2307/2346567>`_ and Luce (1959). Of two responses it is Bradley and Terry's.
    Equal ranks are treated as by `Breslow (1974) <https://doi.org/10.2307/2529620>`_: each is drawn from all that are
    no better.

    Args:
        scores: Of the responses to each prompt, :math:`r_i`.
        ranks: Their places, the best being the lowest.
        mask: True where there is a response.

    Returns:
        The loss of every ranking.

    Example:
        >>> scores, ranks = torch.tensor([[2.0, 0.0, 1.0]]).log1p(), torch.tensor([[0, 1, 2]])
        >>> plackett_luce(scores, ranks, torch.ones(1, 3, dtype=torch.bool)).exp()  # 3/6 of all, then 1/3 of the rest
        tensor([6.0000])
    """
    is_left = mask[:, None, :] & (ranks[:, None, :] >= ranks[:, :, None])
    scores = torch.where(mask, scores, 0.0)
    # What is not there is drawn from itself alone, so that there is no infinity whose gradient is NaN.
    is_left = is_left | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rest = torch.where(is_left, scores[:, None, :], -torch.inf).logsumexp(2)
    return masked_sum(rest - scores, mask, dim=1)


def squared_sum(
    scores: Float[Tensor, "batch responses"], mask: Bool[Tensor, "batch responses"]
) -> Float[Tensor, " batch"]:
    r"""What keeps scores around 0, to which comparisons are blind.

    .. math:: \Bigl(\sum_i r_i\Bigr)^2

    Of two responses as in `Helping or Herding? <https://arxiv.org/abs/2312.09244>`_, section 3.

    Args:
        scores: Of the responses to each prompt, :math:`r_i`.
        mask: True where there is a response.

    Returns:
        One term per comparison.

    Example:
        >>> squared_sum(torch.tensor([[3.0, -1.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([4.])
    """
    return masked_sum(scores, mask, dim=1).square()


def ordered_pairs(
    scores: Float[Tensor, "batch responses"],
    ranks: Int[Tensor, "batch responses"],
    mask: Bool[Tensor, "batch responses"],
) -> tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """All pairs of which one response was judged better.

    Args:
        scores: Of the responses to each prompt.
        ranks: Their places, the best being the lowest.
        mask: True where there is a response.

    Returns:
        The better one's score less the other's, and the number of the comparison that the pair is from.

    Example:
        >>> scores, ranks = torch.tensor([[5.0, 3.0, 2.0]]), torch.tensor([[0, 1, 1]])
        >>> ordered_pairs(scores, ranks, torch.ones(1, 3, dtype=torch.bool))
        (tensor([2., 3.]), tensor([0, 0]))
    """
    is_better = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    rows, better, worse = is_better.nonzero().unbind(1)
    return scores[rows, better] - scores[rows, worse], rows
