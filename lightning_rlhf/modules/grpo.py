"""Group Relative Policy Optimization."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rlhf.batches import Experience, Rollouts, Scores
from lightning_rlhf.functional.advantages import group_relative
from lightning_rlhf.functional.averaging import Averaging
from lightning_rlhf.functional.kl import k1, k3
from lightning_rlhf.functional.masked import masked_sum
from lightning_rlhf.functional.policy import ClipRange, clip_bounds, clipped_surrogate, outside_clip
from lightning_rlhf.models.loading import ModelLike
from lightning_rlhf.modules.online import OnlineModule


class GRPOModule(OnlineModule):
    r"""Group Relative Policy Optimization, from `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_.

    Every prompt gets ``group_size`` responses. A response is credited, on each of its tokens, with how much better it
    scored than its group,

    .. math:: A_i = (r_i - \operatorname{mean}(r)) / \operatorname{std}(r),

    and the policy moves towards the better ones, no further per iteration than the clip allows and not far from the
    reference. Minimised is, averaged over the tokens of a response and then over responses,

    .. math:: -\min\bigl(\rho_{i,t} A_i, \operatorname{clip}(\rho_{i,t}, 1 - \epsilon, 1 + \epsilon) A_i\bigr),

    eq. 3 of the paper but for the divergence, for which the response is charged (see ``kl_in``). There is no value
    model. Scores are compared whole: of dense ones the sum over the response counts.

    Args:
        policy: The network to train: a name, folder, object, config or :class:`ModelSpec`.
        group_size: Responses sampled per prompt, :math:`G`; the paper has 64.
        clip_range: How far a ratio may move per iteration, :math:`\epsilon`; two numbers for below and above 1. PPO's.
        divide_by_std: False keeps only the centring, as `Dr. GRPO <https://arxiv.org/abs/2503.20783>`_ argues for.
        averaging: What the loss is averaged over: ``"responses"`` as in the paper, ``"tokens"`` as in DAPO, or by the
            fixed ``"length"`` as in Dr. GRPO.
        num_epochs: How often each response is learnt from.
        kl_coef: Price of a nat of divergence from the reference, :math:`\beta`; at 0 there is no reference.
        kl_in: ``"reward"`` takes ``kl_coef`` times the response's summed log-ratio off its score, and has the optimum
            that RLHF asks for; ``"loss"`` adds the paper's per-token :math:`k_3`, which has another
            (`docs/algorithms/grpo.md`).
        **kwargs: Passed to :class:`OnlineModule`: reward, reference, sampling, minibatches, optimizer.
    """

    def __init__(
        self,
        policy: ModelLike,
        *,
        group_size: int = 8,
        clip_range: ClipRange = 0.2,
        divide_by_std: bool = True,
        averaging: Averaging = "responses",
        num_epochs: int = 1,
        kl_coef: float = 0.04,
        kl_in: Literal["reward", "loss"] = "reward",
        **kwargs: Any,
    ) -> None:
        if group_size < 2:
            raise ValueError(f"`group_size={group_size}` must be at least 2: a response is compared with its group.")
        if "responses_per_prompt" in kwargs:
            raise TypeError("`responses_per_prompt` is called `group_size` here: leave it out.")
        super().__init__(
            policy,
            responses_per_prompt=group_size,
            averaging=averaging,
            num_epochs=num_epochs,
            kl_coef=kl_coef,
            kl_in=kl_in,
            **kwargs,
        )
        self.group_size = group_size
        self.clip_range = clip_bounds(clip_range)
        self.divide_by_std = divide_by_std

    def experience(self, rollouts: Rollouts, scores: Scores) -> Experience:
        """Credits every token of a response with the advantage of the whole response."""
        mask = rollouts.sampled_mask
        total = self.scaled(scores, rollouts).total  # (batch,)
        groups = total.unflatten(0, (-1, self.group_size))  # (groups, group)
        self.report.add("reward/equal_group_rate", groups.amax(1) == groups.amin(1))
        ref_logprobs = self.reference_logprobs(rollouts)  # (batch, response), or None while kl_coef is 0
        is_in_loss = ref_logprobs is not None and self.kl_in == "loss"
        if ref_logprobs is not None and self.kl_in == "reward":
            total = total - self.kl_coef * masked_sum(k1(rollouts.old_logprobs, ref_logprobs), mask, dim=1)
        advantages = group_relative(total, self.group_size, self.divide_by_std)  # (batch,)
        return Experience.from_rollouts(
            rollouts,
            scores=scores,
            ref_logprobs=ref_logprobs,
            advantages=torch.where(mask, advantages[:, None], 0.0),  # (batch, response)
            has_signal=None if is_in_loss else advantages != 0,
        )

    def loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3, negated: one term per token, for the base class to weigh and add up."""
        output = self.policy(batch)
        ratio = self.ratio(output.logprobs, batch)  # (batch, response)
        loss = clipped_surrogate(ratio, batch.advantages, self.clip_range)
        metrics = {
            "policy/loss": loss,
            "policy/entropy": output.entropy,
            "policy/ratio": ratio,
            "policy/clip_fraction": outside_clip(ratio, self.clip_range),
        }
        if batch.ref_logprobs is not None and self.kl_in == "loss":
            loss = loss + self.kl_coef * k3(output.logprobs, batch.ref_logprobs)
        return loss, metrics
