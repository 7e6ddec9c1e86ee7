"""One iteration of an online algorithm: roll out, score, make experience of it, update."""

from __future__ import annotations

import functools
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlhf.batches import Experience, PromptBatch, Rollouts, Scores
from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.base import RLHFDataModule
from lightning_rlhf.functional.masked import moments, whiten
from lightning_rlhf.generation.recorder import FEWEST
from lightning_rlhf.generation.sampling import Sampling, SamplingLike
from lightning_rlhf.models.loading import ModelLike, ModelSpec, check_frozen
from lightning_rlhf.modules.networks import OnlineNetworks
from lightning_rlhf.modules.ranks import most_over_ranks, rank, sum_over_ranks, world_size
from lightning_rlhf.modules.resuming import STATE
from lightning_rlhf.modules.sampler import SamplerCorrection
from lightning_rlhf.modules.scaling import RewardScaling, ScoreScaler
from lightning_rlhf.modules.scoring import scored
from lightning_rlhf.rewards.callables import RewardLike
from lightning_rlhf.rewards.combine import CombinedReward
from lightning_rlhf.rewards.metrics import MetricFunction, MetricLike


class OnlineModule(OnlineNetworks):
    """A policy that learns from what it writes; an algorithm adds :meth:`experience` and :meth:`loss`.

    One ``training_step`` is one iteration. Defaults are trlX's where it has one.

    Args:
        policy: The network to train: a name, folder, object, config or :class:`ModelSpec`.
        reward: A callable on prompts and responses, its dotted name, a classifier's folder, hub name or object (or a
            :class:`RewardModel`), or a list of these, each alone or with a weight.
        reference: What the policy must not stray from: by default the policy as it was at the start; or a name,
            folder, object, config or :class:`ModelSpec`.
        sampling: A :class:`Sampling`, or a dict of its fields.
        responses_per_prompt: Responses that every prompt gets.
        kl_coef: Weight of the divergence from the reference, per nat; at 0 there is no reference.
        kl_in: Whether the divergence is charged to the ``"reward"`` or added to the ``"loss"``.
        normalize_rewards: True, or names: rewards brought to mean 0 and deviation 1 so far, before they are weighed.
        reward_clip: Scores are clipped to this far from 0; None does not clip.
        reward_scaling: After clipping, divides scores by the standard deviation of all scores so far (``"running"``)
            or of the first iteration (``"first"``); the mean is never taken off.
        missing_eos_penalty: Taken off the score of a response that was cut off, before clipping.
        reward_in_background: Whether rewards work in a thread of their own while the reference reads, for those that
            wait for an endpoint.
        offload_frozen: Whether reference and reward models are in host memory while they are not asked, at the price of
            the time in which they come to the device. (A ``RewardModel(device=...)`` stays where it is.)
        metric_fn: Called in evaluation as a reward is; returns a dict of numbers, which are logged under their names.
        trunk_gib: Memory, in GiB and per process, that what frozen blocks made of an iteration's tokens may take. It is
            kept so that they run once; where it would take more they run in every pass, with the same result.
        recompute_logprobs: Whether ratios and divergences begin from log-probs of the pass that trains instead of those
            that the sampler kept, as :class:`SamplerCorrection` says.
        importance_cap: Weighs tokens by how far these two are apart, at most by this; None does not.
        **kwargs: Passed to :class:`ManualModule` (epochs and minibatches, averaging, clipping) and :class:`RLHFModule`
            (tokenizer, dropout, seed, optimizer and schedule).
    """

    learns_from = (PromptBatch, "PromptDataModule")

    def __init__(
        self,
        policy: ModelLike,
        *,
        reward: RewardLike,
        reference: ModelLike | None = None,
        sampling: SamplingLike = None,
        responses_per_prompt: int = 1,
        kl_coef: float = 0.001,
        kl_in: Literal["reward", "loss"] = "reward",
        normalize_rewards: bool | list[str] = False,
        reward_clip: float | None = 10.0,
        reward_scaling: RewardScaling | None = None,
        missing_eos_penalty: float | None = None,
        reward_in_background: bool = False,
        offload_frozen: bool = False,
        metric_fn: MetricLike | None = None,
        trunk_gib: float = 4.0,
        recompute_logprobs: bool = False,
        importance_cap: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if responses_per_prompt < 1:
            raise ValueError(f"`responses_per_prompt={responses_per_prompt}` must be at least 1.")
        if kl_in not in ("reward", "loss"):
            raise ValueError(f"`kl_in={kl_in!r}` must be 'reward' or 'loss': the divergence is charged once.")
        if not kl_coef >= 0:
            raise ValueError(f"`kl_coef={kl_coef}` must not be negative: it is the price of leaving the reference.")
        if reference is not None and kl_coef == 0:
            raise ValueError(
                f"`reference={reference!r}` would be read by nothing at `kl_coef=0`: leave one of them out."
            )
        self.reward = CombinedReward(reward)
        self.reward_in_background = reward_in_background
        self.offload_frozen = offload_frozen
        self._ahead: Tensor | None = None  # log-probs under the reference, read while the reward worked
        self.reference_spec = None if reference is None else ModelSpec.of(reference)
        if self.reference_spec is not None:
            check_frozen(self.reference_spec, "reference")
        self.sampling = Sampling.of(sampling)
        self.sampling.check_trainable()
        self.metric_fn = None if metric_fn is None else MetricFunction(metric_fn)
        self.responses_per_prompt = responses_per_prompt
        self.kl_coef = kl_coef
        self.kl_in = kl_in
        weights = self.reward.weight_by_name
        self.scaled = ScoreScaler(reward_clip, reward_scaling, missing_eos_penalty, weights, normalize_rewards)
        if not trunk_gib >= 0:
            raise ValueError(f"`trunk_gib={trunk_gib}` must not be negative; 0 keeps nothing.")
        self.trunk_gib = trunk_gib
        self.corrected = SamplerCorrection(recompute_logprobs, importance_cap)
        self.with_final_values = False
        self._began: dict[str, Any] | None = None  # how the iteration that is under way did, None between two

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """One iteration."""
        started = time.perf_counter()
        self._began = {**self._state(), "updates": self.trainer.global_step}
        with self.report.phase("generate", self.trainer):
            rollouts = self.rollout(prompts)
        with self.report.phase("score", self.trainer):
            scores = self.score(rollouts)
            if self.corrected.recomputes:
                self.corrected(rollouts, self.read_by(self.policy.scored, rollouts), self.report)
        experience = self.experience(rollouts, scores)
        self.report.observe(experience, self.special_tokens.eos)
        if experience.ref_logprobs is not None:
            self.report.add("kl/coef", torch.tensor(self.kl_coef, dtype=torch.float64))
        self.call_callbacks("on_experience", experience)
        with self.report.phase("update", self.trainer):
            for minibatch in self.minibatches(experience):
                self.update(minibatch)
        self.report.send(self, self.iteration, experience.response_mask.sum(), time.perf_counter() - started)
        self.iteration += 1
        self._began = None

    @abstractmethod
    def experience(self, rollouts: Rollouts, scores: Scores) -> Experience:
        """What the algorithm makes of rollouts and their scores: at least the advantages.

        Args:
            rollouts: What was written.
            scores: What the reward gave, as it gave it; ``self.scaled(scores, rollouts)`` clips and scales.

        Returns:
            All that :meth:`loss` reads.
        """

    @torch.no_grad()
    def rollout(self, prompts: PromptBatch) -> Rollouts:
        """Writes ``responses_per_prompt`` responses to every prompt.

        Row ``j`` of rank ``r`` is row ``j * world_size + r`` of the iteration, whose random numbers depend on the seed,
        the iteration and that number alone.

        Args:
            prompts: Of this process.

        Returns:
            What was written.
        """
        group = self.responses_per_prompt
        rows = [((i // group) * world_size() + rank()) * group + i % group for i in range(len(prompts) * group)]
        uniforms = row_uniforms(self.seed, "rollout", (self.iteration,), rows, self.sampling.max_new_tokens)
        trunk_bytes = int(self.trunk_gib * 2**30)
        with self._packed(len(rows)):
            return self.respond(prompts, uniforms, self.sampling, self.with_final_values, group, trunk_bytes)

    def _packed(self, rows: int) -> AbstractContextManager[Any]:
        """The policy's linear layers as oneDNN likes them; where it writes no more than a few tokens, as they are."""
        from lightning_rlhf.models.linear import packed_linears  # imports transformers, which is there by now

        decoder, length = self.policy.decoder, self.sampling.max_new_tokens
        if length < FEWEST:
            return nullcontext()
        tokens = min(rows, self.micro_batch_size or self.minibatch_size) * length
        tokens = min(tokens, self.micro_batch_tokens or tokens)
        return packed_linears(decoder.model, rows, tokens, decoder.encoder_blocks)

    def score(self, rollouts: Rollouts) -> Scores:
        """Calls the rewards on this process's rows. If one fails anywhere, all processes stop.

        Args:
            rollouts: What was written.

        Returns:
            The scores.
        """

        def read_ahead() -> None:
            self._ahead = None if self.reference is None else self.reference_logprobs(rollouts)

        meanwhile = read_ahead if self.reward_in_background else None
        scores, self.rows_of_largest = scored(self.reward, rollouts, self.tokenizer, meanwhile)
        return scores

    def reference_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """Log-probs of the responses under the reference.

        Args:
            rollouts: What was written.

        Returns:
            (batch, response), 0 in the padding; or None while ``kl_coef`` is 0.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None or self.kl_coef == 0:
            return ahead
        if self.reference is None:
            raise ValueError(f"`kl_coef={self.kl_coef}` was 0 when the networks were built: begin above 0.")
        return self.read_by(self.reference.logprobs, rollouts)

    def read_by(self, score: Callable[..., Tensor], rollouts: Rollouts) -> Tensor:
        """What a network says of the responses, in passes of the size of a micro-batch.

        Args:
            score: A policy's or reference's method, or :func:`in_pieces` of a network.
            rollouts: What was written.

        Returns:
            (batch, response), 0 in the padding.
        """
        size = self.micro_batch_size or self.minibatch_size
        most = functools.partial(most_over_ranks, device=rollouts.response_mask.device)
        return score(rollouts, size, self.micro_batch_tokens, most)

    def whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mean 0 and variance 1 over what the mask counts on all ranks.

        Args:
            x: (batch, response).
            mask: (batch, response), True where an entry counts.

        Returns:
            (batch, response), 0 elsewhere.
        """
        return whiten(x, mask, sum_over_ranks(moments(x, mask)))

    def on_fit_start(self) -> None:
        """Says once what a resumed run would lose."""
        resumed = self.trainer.ckpt_path is not None
        if resumed and not isinstance(getattr(self.trainer, "datamodule", None), RLHFDataModule):
            rank_zero_warn("Resumed with a data loader that does not remember its place: an epoch begins anew.")

    def on_train_start(self) -> None:
        """Makes sure of the reference, once everything is restored and converted."""
        super().on_train_start()
        self._began = None
        if self.reference is not None:
            self.reference.check()

    @property
    def max_prompt_tokens(self) -> int | None:
        """Positions of the policy less those that a response may need."""
        return self.policy.decoder.prompt_room(self.sampling.max_new_tokens)

    def _state(self) -> dict[str, Any]:
        """What an iteration changes beside the weights."""
        # A NumPy number would not load with `weights_only=True`.
        return {"iteration": self.iteration, "kl_coef": float(self.kl_coef), "scaler": self.scaled.state_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is neither weight nor optimizer; an iteration that is under way is to begin anew."""
        super().on_save_checkpoint(checkpoint)
        state = {**self._state(), "updates": 0}
        if self._began is not None:
            state = {**self._began, "updates": self.trainer.global_step - self._began["updates"]}
        state["reference"] = None if self.reference is None else self.reference.state_dict()
        checkpoint[STATE] |= state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back; whether the reference is the same is looked at when training starts."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[STATE]
        self.iteration, self.kl_coef = state["iteration"], state["kl_coef"]
        self.scaled.load_state_dict(state["scaler"])
        if self.reference is not None and state["reference"] is not None:
            self.reference.load_state_dict(state["reference"])
        if state["updates"]:
            rank_zero_warn(
                f"`ckpt_path` was written in the middle of iteration {self.iteration}, which begins anew with weights "
                f"that it had updated {state['updates']} times: what follows is sound, but not what an uninterrupted "
                "run would have done. A checkpoint from between two iterations would go on with that."
            )
