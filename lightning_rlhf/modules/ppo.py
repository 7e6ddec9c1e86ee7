"""Proximal Policy Optimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_rlhf.batches import Experience, Rollouts, Scores
from lightning_rlhf.functional.advantages import gae, shaped_rewards, token_rewards
from lightning_rlhf.functional.averaging import Averaging
from lightning_rlhf.functional.kl import k1, k2, k3
from lightning_rlhf.functional.masked import mean_and_variance, moments
from lightning_rlhf.functional.policy import ClipRange, clip_bounds, clipped_surrogate, outside_clip
from lightning_rlhf.functional.value import clipped_value_loss
from lightning_rlhf.models.loading import ModelLike
from lightning_rlhf.modules.critics import ActorCriticModule
from lightning_rlhf.modules.ranks import sum_over_ranks

_LOSS_ESTIMATORS = {"k2": k2, "k3": k3}


class PPOModule(ActorCriticModule):
    r"""Proximal Policy Optimization, from `Schulman et al. <https://arxiv.org/abs/1707.06347>`_, as RLHF uses it.

    A token is a step. The last one earns the score of the response, and every one is charged for its distance from the
    reference (`Ziegler et al. <https://arxiv.org/abs/1909.08593>`_, eq. 2),

    .. math:: r_t = [t = T]\, r(x, y) - \beta \log \frac{\pi(a_t | s_t)}{\pi_\mathrm{ref}(a_t | s_t)}.

    A critic, by default a value head on the policy's last states, predicts what is still to come; advantages
    :math:`A_t` are those of `GAE <https://arxiv.org/abs/1506.02438>`_. Several epochs over shuffled minibatches
    minimise, averaged over tokens,

    .. math:: -\min\bigl(\rho_t A_t, \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t\bigr)
        + c_V \tfrac{1}{2} (V_t - R_t)^2 - c_H H_t,

    eq. 9 of the paper with the value clipped like the ratio. Defaults are trlX's.

    Args:
        policy: The network to train: a name, folder, object, config or :class:`ModelSpec`.
        clip_range: How far a ratio may move per iteration, :math:`\epsilon`; two numbers for below and above 1.
        dual_clip: Bounds the ratio of bad tokens; none by default.
        value_clip_range: How far a value may move per iteration, in units of the return; None does not clip.
        vf_coef: Weight of the value loss, :math:`c_V`.
        ent_coef: Weight of the entropy, :math:`c_H`.
        gamma: Discount per token.
        gae_lambda: How far advantages look ahead, :math:`\lambda`.
        whiten_advantages: Whether advantages get mean 0 and variance 1, once an iteration, over all ranks.
        bootstrap_truncated: Whether a response that was cut off is worth what the value says of its end; by default its
            end is as final as an EOS.
        critic_warmup: In so many first iterations only the critic's own parameters move.
        averaging: What the loss is averaged over: ``"tokens"``, ``"responses"``, or by the fixed ``"length"``.
        kl_coef: Price of a nat of divergence from the reference, :math:`\beta`; at 0 there is no reference.
        kl_in: ``"reward"`` as above; ``"loss"`` adds ``kl_estimator`` per token, whose optimum is another one
            (`docs/algorithms/ppo.md`).
        kl_estimator: ``"k1"`` in the reward; ``"k2"`` or ``"k3"`` in the loss.
        **kwargs: Passed to :class:`ActorCriticModule` (where values come from) and :class:`OnlineModule`: reward,
            reference, sampling, epochs and minibatches, optimizer.
    """

    def __init__(
        self,
        policy: ModelLike,
        *,
        clip_range: ClipRange = 0.2,
        dual_clip: float | None = None,
        value_clip_range: float | None = 0.2,
        vf_coef: float = 1.0,
        ent_coef: float = 0.0,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        whiten_advantages: bool = True,
        bootstrap_truncated: bool = False,
        critic_warmup: int = 0,
        averaging: Averaging = "tokens",
        kl_coef: float = 0.001,
        kl_in: Literal["reward", "loss"] = "reward",
        kl_estimator: Literal["k1", "k2", "k3"] = "k1",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, averaging=averaging, kl_coef=kl_coef, kl_in=kl_in, **kwargs)
        if kl_in == "reward" and kl_estimator != "k1":
            raise ValueError(f"`kl_estimator={kl_estimator!r}` goes with `kl_in='loss'`: the reward is charged k1.")
        if kl_in == "loss" and kl_estimator not in _LOSS_ESTIMATORS:
            raise ValueError(
                f"`kl_estimator={kl_estimator!r}` does nothing with `kl_in='loss'`, since its expected gradient is 0: "
                "use 'k2' or 'k3', or `kl_in='reward'`."
            )
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"`dual_clip={dual_clip}` must be above 1, or None: it bounds a ratio from above.")
        for name, value in {"gamma": gamma, "gae_lambda": gae_lambda}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}={value}` must lie between 0 and 1.")
        self.clip_range = clip_bounds(clip_range)
        self.dual_clip = dual_clip
        self.value_clip_range = value_clip_range
        self.vf_coef = vf_coef
        self.ent_coef = ent_coef
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.whiten_advantages = whiten_advantages
        self.bootstrap_truncated = bootstrap_truncated
        self.with_final_values = bootstrap_truncated and self.sampler_keeps_values
        self.critic_warmup = critic_warmup
        self.kl_estimator = kl_estimator

    def experience(self, rollouts: Rollouts, scores: Scores) -> Experience:
        """Credits every token with its advantage."""
        self.add_values(rollouts, self.bootstrap_truncated)
        assert rollouts.values is not None
        mask = rollouts.sampled_mask
        scaled = self.scaled(scores, rollouts)
        rewards = token_rewards(scaled.total, scaled.token_scores, mask)  # (batch, response)
        ref_logprobs = self.reference_logprobs(rollouts)  # (batch, response), or None while kl_coef is 0
        if ref_logprobs is not None and self.kl_in == "reward":
            rewards = shaped_rewards(rewards, k1(rollouts.old_logprobs, ref_logprobs), mask, self.kl_coef)
        advantages, returns = gae(
            rewards, rollouts.values, mask, self.gamma, self.gae_lambda, final_values=rollouts.final_values
        )
        self._log_explained_variance(returns, rollouts.values, mask)
        return Experience.from_rollouts(
            rollouts,
            scores=scores,
            ref_logprobs=ref_logprobs,
            advantages=self.whiten(advantages, mask) if self.whiten_advantages else advantages,
            returns=returns,
        )

    def loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 9, negated: one term per token, for the base class to weigh and add up."""
        assert batch.values is not None
        assert batch.returns is not None
        output = self.policy(batch)
        values = self.values(batch, output)
        ratio = self.ratio(output.logprobs, batch)  # (batch, response)
        policy_loss = clipped_surrogate(ratio, batch.advantages, self.clip_range, self.dual_clip)
        value_loss = clipped_value_loss(values, batch.values, batch.returns, self.value_clip_range)
        metrics = {
            "policy/loss": policy_loss,
            "policy/entropy": output.entropy,
            "policy/ratio": ratio,
            "policy/clip_fraction": outside_clip(ratio, self.clip_range),
            "value/loss": value_loss,
        }
        if self.value_clip_range is not None:
            metrics["value/clip_fraction"] = ((values - batch.values).abs() > self.value_clip_range).float()

        loss = policy_loss + self.vf_coef * value_loss - self.ent_coef * output.entropy
        if batch.ref_logprobs is not None and self.kl_in == "loss":
            loss = loss + self.kl_coef * _LOSS_ESTIMATORS[self.kl_estimator](output.logprobs, batch.ref_logprobs)
        return loss, metrics

    def resting_parameters(self) -> Iterable[nn.Parameter]:
        """The language model, while the critic warms up."""
        return self.policy_parameters() if self.iteration < self.critic_warmup else ()

    def _log_explained_variance(self, returns: Tensor, values: Tensor, mask: Tensor) -> None:
        """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
        both = torch.stack([moments(returns - values, mask), moments(returns, mask)])
        _, variance = mean_and_variance(sum_over_ranks(both))
        self.report.add("value/explained_variance", 1.0 - variance[0] / variance[1].clamp(min=1e-12))
