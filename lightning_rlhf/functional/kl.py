r"""Per-token estimators of :math:`\mathrm{KL}(\pi \,\|\, \pi_\mathrm{ref})` for tokens drawn from :math:`\pi`.

They are those of John Schulman's note `Approximating KL Divergence <http://joschu.net/blog/kl-approx.html>`_.
"""

from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""The log-ratio itself: unbiased, of either sign.

    .. math:: k_1 = \log \pi - \log \pi_\mathrm{ref}

    Args:
        logprobs: Under the policy.
        ref_logprobs: Under the reference.

    Returns:
        The estimate of every token, in nats.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Half the squared log-ratio: biased, never negative.

    .. math:: k_2 = \tfrac{1}{2} (\log \pi - \log \pi_\mathrm{ref})^2

    Args:
        logprobs: Under the policy.
        ref_logprobs: Under the reference.

    Returns:
        The estimate of every token, in nats.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Unbiased and never negative.

    .. math:: k_3 = \frac{\pi_\mathrm{ref}}{\pi} - 1 - \log \frac{\pi_\mathrm{ref}}{\pi}

    Its gradient is not that of the divergence (`DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, eq. 4, uses it so).

    Args:
        logprobs: Under the policy.
        ref_logprobs: Under the reference.

    Returns:
        The estimate of every token, in nats.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio
