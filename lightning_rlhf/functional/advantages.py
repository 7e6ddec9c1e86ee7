"""From scores to rewards, from rewards to advantages."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_rewards(
    scores: Float[Tensor, " batch"],
    token_scores: Float[Tensor, "batch response"] | None,
    mask: Bool[Tensor, "batch response"],
) -> Float[Tensor, "batch response"]:
    """Puts the score of a response on its last token, or every dense score on its own.

    Args:
        scores: One score per response.
        token_scores: One score per token, where the reward is dense; then ``scores`` is not read.
        mask: True where the policy chose a token.

    Returns:
        The reward of every token, 0 where the mask is False.

    Example:
        >>> token_rewards(torch.tensor([2.0]), None, torch.tensor([[True, True, False]]))
        tensor([[0., 2., 0.]])
    """
    if token_scores is not None:
        return torch.where(mask, token_scores, 0.0)
    after = mask.flip(1).cumsum(1).flip(1)  # (batch, response): tokens that count from here on
    return torch.where(mask & (after == 1), scores[:, None], 0.0)


def shaped_rewards(
    rewards: Float[Tensor, "batch response"],
    kl: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    kl_coef: float,
) -> Float[Tensor, "batch response"]:
    r"""Charges every token for its distance from the reference.

    .. math:: r_t - \beta \log \frac{\pi(a_t | s_t)}{\pi_\mathrm{ref}(a_t | s_t)}

    Eq. 2 of `Fine-Tuning Language Models from Human Preferences <https://arxiv.org/abs/1909.08593>`_, spread over the
    tokens.

    Args:
        rewards: What the score gave every token.
        kl: The log-ratio of every token, :func:`lightning_rlhf.functional.kl.k1`.
        mask: True where the policy chose a token.
        kl_coef: Price of a nat, :math:`\beta`.

    Returns:
        The reward of every token, 0 where the mask is False.

    Example:
        >>> shaped_rewards(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, -1.0]]), torch.tensor([[True, True]]), 0.5)
        tensor([[-1.0000,  1.5000]])
    """
    return torch.where(mask, rewards - kl_coef * kl, 0.0)


def gae(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    final_values: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    r"""Generalised advantage estimation.

    .. math:: A_t = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{t+l}, \qquad
        \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)

    Eqs. 11 and 16 of `High-Dimensional Continuous Control Using Generalized Advantage Estimation
    <https://arxiv.org/abs/1506.02438>`_. Tokens that the mask leaves out are no steps: the sum goes from the step
    before them to the step after.

    Args:
        rewards: Of every token.
        values: Read at the state before every token, :math:`V(s_t)`.
        mask: True where the policy chose a token.
        gamma: Discount, :math:`\gamma`.
        gae_lambda: How far the sum looks ahead, :math:`\lambda`: 0 trusts the values, 1 the rewards.
        final_values: Value of the state after the last token, for responses that were cut off; by default, and where
            it is 0, the last state is terminal.

    Returns:
        Advantages and returns (advantages plus values), 0 where the mask is False.

    Example:
        >>> ones = torch.ones(1, 2)
        >>> gae(torch.tensor([[0.0, 1.0]]), 0.5 * ones, ones.bool(), gamma=1.0, gae_lambda=1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    next_value = torch.zeros_like(values[:, 0]) if final_values is None else final_values.to(values.dtype)
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        step = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(step, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(step, values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.where(mask, torch.stack(columns[::-1], dim=1), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_relative(
    scores: Float[Tensor, " batch"], group_size: int, divide_by_std: bool = True, eps: float = 1e-4
) -> Float[Tensor, " batch"]:
    r"""How much better every response scored than its group.

    .. math:: A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r) + \epsilon}

    Section 4.1.2 of `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_. Without the division it is the advantage of
    `Dr. GRPO <https://arxiv.org/abs/2503.20783>`_.

    Args:
        scores: One per response, the responses of a group one after the other.
        group_size: Responses of a group.
        divide_by_std: Whether to divide by the standard deviation of the group (``ddof=1``), or only to take its mean
            off.
        eps: Keeps a standard deviation that is rounding from being blown up, :math:`\epsilon`, in units of the score;
            the paper has none, TRL has this one.

    Returns:
        The advantage of every response; exactly 0 in a group of equal scores.

    Raises:
        ValueError: If the scores do not make whole groups.

    Example:
        >>> group_relative(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2, divide_by_std=False)
        tensor([-1.,  1.,  0.,  0.])
    """
    if group_size < 1 or len(scores) % group_size:
        raise ValueError(f"`group_size={group_size}` does not divide {len(scores)} scores into whole groups.")
    groups = scores.unflatten(0, (-1, group_size))  # (groups, group)
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    # The mean of equal numbers is not always the number.
    is_level = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return torch.where(is_level, 0.0, advantages).flatten()
