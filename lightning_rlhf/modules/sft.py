"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_rlhf.batches import ImitationBatch
from lightning_rlhf.models.loading import ModelLike
from lightning_rlhf.modules.meter import Statistic
from lightning_rlhf.modules.offline import OfflineModule
from lightning_rlhf.modules.report import Report
from lightning_rlhf.modules.text_metrics import Perplexity, TokenAccuracy


class SFTModule(OfflineModule):
    r"""Supervised fine-tuning: maximum likelihood of responses to their prompts.

    .. math:: -\frac{1}{\sum_i |y_i|} \sum_i \sum_t \log \pi(y_{i,t} | x_i, y_{i,<t})

    The mean is over the response tokens of an optimizer step, on all processes; of a conversation over those that the
    assistant wrote.

    Args:
        policy: The network to train: a name, folder, object, config or :class:`ModelSpec`.
        neftune_alpha: How much noise is added to the embeddings of what is read in training, :math:`\alpha` of `NEFTune
            <https://arxiv.org/abs/2310.05914>`_, which tries 5, 10 and 15.
        disable_dropout: Whether dropout is 0 while this module trains; imitation keeps it by default.
        **kwargs: Passed to :class:`RLHFModule`: tokenizer, seed, optimizer and schedule,
            evaluation_sampling (of predictions, and of what the callback ``ValidationSamples`` shows).
    """

    learns_from = (ImitationBatch, "ConversationDataModule")

    def __init__(
        self, policy: ModelLike, *, neftune_alpha: float = 0.0, disable_dropout: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(policy, disable_dropout=disable_dropout, **kwargs)
        if not 0.0 <= neftune_alpha < float("inf"):
            raise ValueError(f"`neftune_alpha={neftune_alpha}` must be finite, and not negative; 0 adds no noise.")
        self.neftune_alpha = neftune_alpha
        self._predicted: dict[int, tuple[Perplexity, TokenAccuracy]] = {}  # by loader, of the evaluation under way

    def build(self) -> None:
        """Makes the policy, and lets it add noise."""
        super().build()
        decoder = self.policy.decoder
        if self.neftune_alpha and decoder.has_encoder:
            raise ValueError(
                f"`neftune_alpha={self.neftune_alpha}` adds noise to prompt and response as one row, which "
                f"{type(decoder.model).__name__} reads apart: leave it 0."
            )
        self.policy.noise_alpha = self.neftune_alpha

    def training_step(self, batch: ImitationBatch, batch_idx: int) -> Tensor:
        """The summed negative log-likelihood of a batch."""
        self.begin_step(batch_idx)
        return self.summed("policy/loss", -self.policy(batch).logprobs, batch.learnt)

    def evaluate(self, batch: ImitationBatch, numbers: list[int], counts: Tensor, loader: int, report: Report) -> None:
        """The negative log-likelihood of every token, and whether it is the likeliest."""
        logprobs, is_likeliest = self.policy.measured(batch)
        mask = batch.learnt & counts[:, None]
        report.add("policy/loss", -logprobs, mask)
        if loader not in self._predicted:
            self._predicted[loader] = (Perplexity().to(self.device), TokenAccuracy().to(self.device))
        perplexity, accuracy = self._predicted[loader]
        perplexity.update(logprobs, mask)
        accuracy.update(is_likeliest, mask)

    def concluded(self, loader: int, statistics: Mapping[str, Statistic]) -> dict[str, float]:
        """Perplexity and accuracy of a loader."""
        perplexity, accuracy = self._predicted.pop(loader)
        return {
            "policy/perplexity": float(perplexity.compute()),
            "policy/token_accuracy": float(accuracy.compute()),
        }

    def on_validation_epoch_start(self) -> None:
        """Nothing has been measured yet."""
        super().on_validation_epoch_start()
        self._predicted = {}

    on_test_epoch_start = on_validation_epoch_start
