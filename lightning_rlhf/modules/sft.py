"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rlhf.batches import ImitationBatch
from lightning_rlhf.models.loading import ModelLike
from lightning_rlhf.modules.offline import OfflineModule
from lightning_rlhf.modules.report import Report


class SFTModule(OfflineModule):
    r"""Supervised fine-tuning: maximum likelihood of responses to their prompts.

    .. math:: -\frac{1}{\sum_i |y_i|} \sum_i \sum_t \log \pi(y_{i,t} | x_i, y_{i,<t})

    The mean is over the response tokens of an optimizer step, on all processes.

    Args:
        policy: The network to train: a name, folder, object, config or :class:`ModelSpec`.
        disable_dropout: Whether dropout is 0 while this module trains; imitation keeps it by default.
        **kwargs: Passed to :class:`RLHFModule`: tokenizer, seed, optimizer and schedule,
            evaluation_sampling (of predictions).
    """

    learns_from = (ImitationBatch, "ConversationDataModule")

    def __init__(self, policy: ModelLike, *, disable_dropout: bool = False, **kwargs: Any) -> None:
        super().__init__(policy, disable_dropout=disable_dropout, **kwargs)

    def training_step(self, batch: ImitationBatch, batch_idx: int) -> Tensor:
        """The summed negative log-likelihood of a batch."""
        self.begin_step(batch_idx)
        return self.summed("policy/loss", -self.policy(batch).logprobs, batch.response_mask)

    def evaluate(self, batch: ImitationBatch, numbers: list[int], counts: Tensor, loader: int, report: Report) -> None:
        """The negative log-likelihood of every token."""
        report.add("policy/loss", -self.policy(batch).logprobs, batch.response_mask & counts[:, None])
