"""Several optimizer steps in one ``training_step``: what Lightning leaves to whoever optimises by hand."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rlhf.batches import Experience
from lightning_rlhf.chance import derived_seed
from lightning_rlhf.functional.averaging import Averaging
from lightning_rlhf.functional.kl import k3
from lightning_rlhf.functional.masked import mean_and_variance, moments
from lightning_rlhf.models.loading import ModelLike
from lightning_rlhf.models.weights import whole
from lightning_rlhf.modules.base import RLHFModule
from lightning_rlhf.modules.minibatches import Minibatch, MinibatchPlan
from lightning_rlhf.modules.optimization import UNDECAYED
from lightning_rlhf.modules.ranks import rank, sum_over_ranks
from lightning_rlhf.modules.report import Report
from lightning_rlhf.modules.trainer_checks import check_callbacks, check_flags, warn_of_missed_checkpoints

_WRONG_ADVICE = (
    "The number of training batches .* is smaller than the logging interval",  # every iteration is logged
    "Using ModelCheckpoint with manual optimization and every_n_train_steps",  # what follows the updates is wanted
)
"""What Lightning warns of that does not hold for these modules."""


class ManualModule(RLHFModule):
    """A module that learns from an iteration's experience in epochs of minibatches.

    It clips, accumulates and schedules by itself, so these are arguments here and not flags of the Trainer.

    Args:
        policy: The network to train.
        num_epochs: How often each response is learnt from.
        minibatch_size: Responses of an optimizer step, per process; the last one of an epoch may have fewer.
        micro_batch_size: Responses of a backward pass, per process; a whole minibatch by default. It changes memory
            and time, never a result.
        micro_batch_tokens: Tokens of a backward pass instead, of prompts and responses, so that memory does not depend
            on how long these are. Padding counts where the policy cannot read without it.
        averaging: What a loss is averaged over: ``"tokens"`` or ``"responses"`` of the minibatch, or by the fixed
            ``"length"`` ``max_new_tokens``.
        max_grad_norm: Gradients are clipped to this norm, over all parameters; None does not clip. trlX has none.
        target_kl: After a minibatch whose mean k3 of the policy that sampled against the one that learns exceeds this
            many nats a token, the iteration's remaining updates are skipped.
        **kwargs: Passed to :class:`RLHFModule`.
    """

    def __init__(
        self,
        policy: ModelLike,
        *,
        num_epochs: int = 4,
        minibatch_size: int = 32,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        averaging: Averaging = "tokens",
        max_grad_norm: float | None = 1.0,
        target_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        self.automatic_optimization = False
        sizes = {"num_epochs": num_epochs, "minibatch_size": minibatch_size, "micro_batch_size": micro_batch_size}
        sizes["micro_batch_tokens"] = micro_batch_tokens
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"`{name}={size}` must be at least 1.")
        if micro_batch_size is not None and micro_batch_tokens is not None:
            raise ValueError(
                f"`micro_batch_size={micro_batch_size}` and `micro_batch_tokens={micro_batch_tokens}` say how much a "
                "backward pass takes: leave one of them out."
            )
        if averaging not in ("tokens", "responses", "length"):
            raise ValueError(f"`averaging={averaging!r}` must be 'tokens', 'responses' or 'length'.")
        for name, limit in {"max_grad_norm": max_grad_norm, "target_kl": target_kl}.items():
            if limit is not None and not limit > 0:
                raise ValueError(f"`{name}={limit}` must be positive, or None for no limit.")
        self.num_epochs = num_epochs
        self.minibatch_size = minibatch_size
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.averaging: Averaging = averaging
        self.max_grad_norm = max_grad_norm
        self.target_kl = target_kl

        self.iteration = 0
        self.report = Report()
        self.rows_of_largest = 0  # of the process that has most, in the present iteration
        self._planned_updates = self._updates_done = 0
        self._drift = torch.zeros(3, dtype=torch.float64)  # moments of k3 over the present minibatch

    @abstractmethod
    def loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective, negated, one term per token; the caller weighs and adds up.

        Args:
            batch: Some rows of the experience.

        Returns:
            Terms and metrics, (batch, response) each. A metric whose name ends in ``/loss`` is averaged as the loss
            is, any other over tokens.
        """

    def minibatches(self, experience: Experience) -> Iterator[Minibatch]:
        """Epochs of shuffled minibatches with weights, fewer once an update has strayed beyond ``target_kl``.

        Args:
            experience: The rows of this process.

        Yields:
            What the next :meth:`update` learns from.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "minibatches", self.iteration, rank()))
        plan = MinibatchPlan(
            experience,
            num_epochs=self.num_epochs,
            minibatch_size=self.minibatch_size,
            micro_batch_size=self.micro_batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            unpads=self.policy.decoder.line(experience) is not None,
            averaging=self.averaging,
            length=self.sampling.max_new_tokens,
            generator=generator,
            rows_of_largest=self.rows_of_largest,
        )
        self._planned_updates, self._updates_done = len(plan), 0
        for minibatch in plan:
            yield minibatch
            if self._strayed_too_far():
                break
        self._updates_done = 0
        self.optimizer_zero_grad(self.trainer.current_epoch, 0, self.optimizers())
        self.policy.decoder.spare.clear()  # what writes the next responses needs memory too

    def update(self, minibatch: Minibatch) -> None:
        """One optimizer step: micro-batches forward and backward, then clip, step, schedule.

        Args:
            minibatch: Its micro-batches, with weights.
        """
        optimizer: Any = self.optimizers()
        self.optimizer_zero_grad(self.trainer.current_epoch, self._updates_done, optimizer)
        self._drift.zero_()
        losses: dict[str, list[Tensor]] = {}
        last = len(minibatch.micro_batches) - 1
        for i, batch in enumerate(minibatch.micro_batches):
            torch.manual_seed(derived_seed(self.seed, "noise", self.trainer.global_step, i, rank()))
            terms, metrics = self.loss(batch)
            assert batch.weights is not None
            counts = batch.weights != 0
            # Gradients are added up here and go over all ranks once, with the last of them.
            with _block_parallel_sync_behavior(self.trainer.strategy, block=i < last):
                self.manual_backward(torch.where(counts, batch.weights * terms, 0.0).sum())
            for name, values in metrics.items():
                if name.endswith("/loss"):
                    part = torch.where(counts, batch.weights * values.detach(), 0.0).sum()
                    losses.setdefault(name, []).append(part)
                else:
                    self.report.add(name, values, counts)
        for name, parts in losses.items():
            self.report.add(name, torch.stack(parts).sum())
        self.report.add("optim/lr", torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64))
        for group in optimizer.param_groups if self.learning_rates else ():
            if not group["name"].endswith(UNDECAYED):
                self.report.add(f"optim/lr/{group['name']}", torch.tensor(group["lr"], dtype=torch.float64))
        optimizer.step()
        self._updates_done += 1
        scheduler: Any = self.lr_schedulers()
        scheduler.step()

    def call_callbacks(self, hook: str, *args: Any) -> None:
        """Calls a hook of our own on every callback that has it.

        Args:
            hook: Such as ``"on_experience"``.
            *args: What it gets after trainer and module.
        """
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self, *args)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips gradients, after they were unscaled and before they are used."""
        for parameter in self.resting_parameters():
            parameter.grad = None  # an optimizer leaves alone what has no gradient, its weight decay included
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves that to fused optimizers, which do it too late to clip
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
        self.report.add("optim/grad_norm", norm)  # of the mean over ranks, which all of them hold

    def resting_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that the present iteration leaves as they are."""
        return ()

    def ratio(self, logprobs: Tensor, batch: Experience) -> Tensor:
        """Probability of each token now over that when it was sampled.

        Where an iteration makes one update only, the log-probs themselves, detached, are the old ones, and the ratio
        is exactly 1.

        Args:
            logprobs: (batch, response), under the policy now.
            batch: What was sampled.

        Returns:
            (batch, response), 1 where nothing was.
        """
        mask = batch.sampled_mask
        log_ratio = torch.where(mask, logprobs - batch.old_logprobs, 0.0)
        counts = mask if batch.weights is None else batch.weights != 0
        if self._updates_done == 0 and batch.importance is None:  # else it has been measured
            self.report.add("policy/sampler_gap", log_ratio.abs(), counts)
        if self.target_kl is not None:
            drift = k3(torch.zeros_like(log_ratio), log_ratio)
            self._drift = self._drift.to(drift.device) + moments(drift, counts)
        if self._planned_updates == 1:
            log_ratio = torch.where(mask, logprobs - logprobs.detach(), 0.0)
        return log_ratio.exp()

    def _strayed_too_far(self) -> bool:
        """Whether the last minibatch was so far from the policy that sampled that the iteration ends; a collective."""
        if self.target_kl is None:
            return False
        mean, _ = mean_and_variance(sum_over_ranks(self._drift))
        return float(mean) > self.target_kl

    def progress(self) -> float:
        """The larger of iterations done over those planned, and updates done over ``max_steps``."""
        trainer = self.trainer
        shares = [0.0]
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != float("inf"):
            within = self._updates_done / self._planned_updates if self._planned_updates else 0.0
            done = max(0, trainer.fit_loop.total_batch_idx)  # of this fit; the module's own count goes on after it
            shares.append((done + within) / (trainer.max_epochs * trainer.num_training_batches))
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        return min(1.0, max(shares))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remembers how many updates there were."""
        super().on_train_batch_start(batch, batch_idx)
        self._updates_before = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks whether a checkpoint was missed within the iteration."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        warn_of_missed_checkpoints(self.trainer, type(self).__name__, self._updates_before)

    def configure_callbacks(self) -> list[Callback]:
        """Refuses what of the Trainer cannot work with updates by hand, and says what to use instead."""
        check_flags(self.trainer, type(self).__name__)
        check_callbacks(self.trainer, type(self).__name__)
        for advice in _WRONG_ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        return super().configure_callbacks()
