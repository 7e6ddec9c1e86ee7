"""How well a model predicts text, token by token, over all rows of all processes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric


class _TokenMean(Metric):
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, mask: Tensor) -> None:
        self.total = self.total + torch.where(mask, values.detach().double(), 0.0).sum()
        self.count = self.count + mask.sum()


class Perplexity(_TokenMean):
    r"""The exponential of the mean negative log-likelihood of a token.

    .. math:: \exp\Bigl(-\frac{1}{n} \sum_t \log \pi(y_t | y_{<t})\Bigr)
    """

    def update(self, logprobs: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> None:
        """Adds tokens.

        Args:
            logprobs: Of the tokens.
            mask: True where one counts.
        """
        self._add(-logprobs, mask)

    def compute(self) -> Tensor:
        """The perplexity; NaN where there was no token."""
        return (self.total / self.count).exp()


class TokenAccuracy(_TokenMean):
    """The share of tokens that are the likeliest after those before them."""

    def update(self, is_likeliest: Bool[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]) -> None:
        """Adds tokens.

        Args:
            is_likeliest: Whether each is.
            mask: True where one counts.
        """
        self._add(is_likeliest, mask)

    def compute(self) -> Tensor:
        """The share; NaN where there was no token."""
        return self.total / self.count
