"""Process reward models, learnt from judgements of single steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from lightning_rlhf.batches import StepBatch
from lightning_rlhf.data.steps import StepDataModule, Steps, step_batch, tokenized_steps
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.loading import ModelLike
from lightning_rlhf.modules.evaluation import expect
from lightning_rlhf.modules.meter import Statistic
from lightning_rlhf.modules.preference_metrics import PreferenceMetrics
from lightning_rlhf.modules.ranks import agree
from lightning_rlhf.modules.report import Report
from lightning_rlhf.modules.scored import ScoringModule, ScoringNetwork


class StepScoringNetwork(ScoringNetwork):
    """What trains."""

    def forward(self, batch: StepBatch) -> Tensor:  # type: ignore[override]
        """The scores of steps, (batch, response), at the token that ends each; 0 elsewhere."""
        return self.decoder.scores_at(batch, batch.step_mask)


class ProcessRewardModule(ScoringModule):
    r"""A process reward model: a score for every step of a response, learnt from what people said of the steps.

    .. math::

        -l_k \log \sigma(s_k) - (1 - l_k) \log \sigma(-s_k) \qquad \text{or} \qquad (s_k - l_k)^2

    for the score :math:`s_k` that is read at the last token of step k, and its label :math:`l_k`. The first is the
    likelihood of a step being right, as in `Solving math word problems with process- and outcome-based feedback
    <https://arxiv.org/abs/2211.14275>`_ and `Let's Verify Step by Step <https://arxiv.org/abs/2305.20050>`_. The mean
    is over the labelled steps of an optimizer step, on all processes. Its export is a dense reward
    (`docs/algorithms/process_reward.md`).

    Args:
        model: What is given a scalar head, and is causal: a name, folder, object, config or :class:`ModelSpec` of a
            decoder-only language model, or of a reward model that is to learn on.
        loss: ``"bce"`` for labels from 0 to 1, the probability that a step is right; ``"mse"`` for numbers of any kind.
        separator: What stands behind every step, and is read before it is scored. None where nothing does, and the data
            says where steps end.
        disable_dropout: Whether dropout is 0 while this module trains; exports have the original values.
        **kwargs: Passed to :class:`RLHFModule`: tokenizer, seed, optimizer and schedule, learning_rates (of ``"model"``
            and ``"head"``), compile.
    """

    learns_from = (StepBatch, "StepDataModule")
    network = StepScoringNetwork

    def __init__(
        self,
        model: ModelLike,
        *,
        loss: Literal["bce", "mse"] = "bce",
        separator: str | None = "\n",
        disable_dropout: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("evaluation_sampling", None) is not None:
            raise TypeError(
                "`evaluation_sampling` is no argument of ProcessRewardModule, which writes nothing: leave it out."
            )
        super().__init__(model, disable_dropout=disable_dropout, **kwargs)
        if loss not in ("bce", "mse"):
            raise ValueError(f"`loss={loss!r}` must be 'bce' or 'mse'.")
        if separator == "":
            raise ValueError("`separator=''` stands nowhere: give one, or None where the data says where steps end.")
        self.loss_name = loss
        self.separator = separator
        self._metrics: dict[int, PreferenceMetrics] = {}  # by loader, of the evaluation that is under way

    def seen(self, model: Any) -> Decoder:
        """What scores steps with it."""
        scorer: Any = super().seen(model)
        if scorer.head is None:
            raise ValueError(
                f"`model={type(model).__name__}` cannot score single steps: its score is no linear function of the "
                "state at a token that has seen what is before it alone. Take a decoder-only model."
            )
        return scorer

    def configure_callbacks(self) -> list[Any]:
        """Tells the data what stands behind a step, too."""
        callbacks = super().configure_callbacks()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StepDataModule):
            data.separator = self.separator
        return callbacks

    # --- the objective --------------------------------------------------------------------------------------------

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """The summed loss of a batch."""
        self.begin_step(batch_idx)
        return self.summed("step/loss", self.loss(self.policy(batch), batch), batch.step_mask)

    def loss(self, scores: Tensor, batch: StepBatch) -> Tensor:
        """The loss of every step.

        Args:
            scores: (batch, response).
            batch: What was said of them.

        Returns:
            (batch, response), of which what lies at the ends of labelled steps counts.

        Raises:
            ValueError: If a label is no probability, and must be; on all processes, which is a collective.
        """
        labels = batch.labels.to(scores)
        if self.loss_name == "mse":
            return mse_loss(scores, labels, reduction="none")
        wrong = batch.step_mask & ((labels < 0.0) | (labels > 1.0))
        error = None
        if bool(wrong.any()):
            error = ValueError(
                f"`labels` of a step are {float(labels[wrong][0])}, and with `loss='bce'` they say how probable it is "
                "that a step is right: give them from 0 to 1, or take `loss='mse'`."
            )
        agree(error, "the loss", 0, self.device)
        return binary_cross_entropy_with_logits(scores, labels, reduction="none")

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, batch: StepBatch, numbers: list[int], counts: Tensor, loader: int, report: Report) -> None:
        """The loss of every step, and whether those that are right are told from those that are wrong."""
        scores = self.policy(batch)
        counted = batch.step_mask & counts[:, None]
        report.add("step/loss", self.loss(scores, batch), counted)
        report.add("reward/mean", self.normalized(scores), counted)
        if self.loss_name == "bce":
            is_certain = counted & ((batch.labels == 0.0) | (batch.labels == 1.0))
            metrics = self._metrics.setdefault(loader, PreferenceMetrics(self.device, "step"))
            metrics.update((scores * (2.0 * batch.labels - 1.0))[is_certain])

    def concluded(self, loader: int, statistics: Mapping[str, Statistic]) -> dict[str, float]:
        """Accuracy and calibration, of labels that are certain."""
        metrics = self._metrics.pop(loader, None)
        return {} if metrics is None else metrics.compute()

    def on_validation_epoch_start(self) -> None:
        """Nothing has been measured yet."""
        super().on_validation_epoch_start()
        self._metrics = {}

    on_test_epoch_start = on_validation_epoch_start

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores the labelled steps of every response.

        Returns:
            A dict per row, without those that only fill up: what the data says of it, ``scores``, one for each step
            that has a label, and ``row``, its number over all processes.
        """
        expect(batch, *self.learns_from, self, "predict_dataloaders", "scores")
        numbers, counts = self._next_rows(len(batch), self.trainer.predict_dataloaders, dataloader_idx)
        scores = self.normalized(self.policy(batch))
        return [
            {
                **{key: values[i] for key, values in batch.metadata.items()},
                "scores": scores[i][batch.step_mask[i]].tolist(),
                "row": number,
            }
            for i, number in enumerate(numbers)
            if counts[i]
        ]

    # --- scores ---------------------------------------------------------------------------------------------------

    def scores_of(self, prompts: Sequence[Any], responses: Sequence[str], start: int) -> list[Any]:
        """Scores the steps of responses side by side.

        Args:
            prompts: Strings or lists of chat messages.
            responses: One to each; a string, taken apart at the separator, or a list of steps.
            start: Number of the first, for errors.

        Returns:
            A list each, one number for every step.
        """
        items = []
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=start):
            steps = None if isinstance(response, str) else tuple(response)
            row = Steps(prompt, steps, str(response), None, (), {}, f"`responses[{number}]`")
            item = tokenized_steps(row, self.separator, self.tokenizer)
            items.append(item._replace(row=replace(row, labels=(0.0,) * sum(item.learnt or ()))))
        self.check_room(start, [len(item.prompt) + item.longest for item in items])
        batch = step_batch(items, self.special_tokens.pad).to(self.device)
        scores = self.normalized(self.policy(batch))
        return [row[is_end].tolist() for row, is_end in zip(scores, batch.step_mask, strict=True)]

    def normalized(self, scores: Tensor) -> Tensor:
        """Scores as the export gives them.

        Args:
            scores: As the network does.

        Returns:
            The probability that a step is right, or the scores as they are.
        """
        return scores.sigmoid() if self.loss_name == "bce" else scores

    def save_pretrained(self, folder: str | os.PathLike[str], merge_adapter: bool = True) -> None:
        """Writes model and tokenizer as a folder for ``RewardModel``, with the original dropout values.

        Args:
            folder: Where to; made if it is missing.
            merge_adapter: True: an adapter that shares a policy's model cannot score its steps.
        """
        if not merge_adapter:
            raise ValueError("`merge_adapter=False`: an adapter on a policy's model scores no steps: leave it out.")
        super().save_pretrained(folder)

    @property
    def reading(self) -> dict[str, Any]:
        """How an export is to be read, for its config."""
        output = "probability" if self.loss_name == "bce" else "logit"
        layer = self.policy.decoder.head  # which reads the state at every token
        return {"reads": "steps", "separator": self.separator, "output": output, "layer": layer}
