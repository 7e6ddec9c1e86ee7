"""Value-function objectives, per token and unreduced."""

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    clip_range: float | None = 0.2,
) -> Float[Tensor, "*shape"]:
    r"""Half the squared error, or half that of the value clipped to the old one's neighbourhood where that is larger.

    .. math:: \tfrac{1}{2} \max\bigl((V_t - R_t)^2,\
        (\operatorname{clip}(V_t, V_t^\mathrm{old} - \epsilon, V_t^\mathrm{old} + \epsilon) - R_t)^2\bigr)

    Not in the PPO paper; it comes with `its authors' code
    <https://github.com/openai/baselines/blob/ea25b9e8b234e6ee1bca43083f8f3cf974143998/baselines/ppo2/model.py#L68-L75>`_.

    Args:
        values: Value of the state before each token, :math:`V_t`.
        old_values: The same when the response was sampled.
        returns: What the value should have been, :math:`R_t`.
        clip_range: How far a value may move before its gradient stops, :math:`\epsilon`, in units of the return; None
            does not clip.

    Returns:
        The loss of every token.

    Example:
        >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip_range=0.5)
        tensor([0.1250])
    """
    error = (values - returns).square()
    if clip_range is not None:
        clipped = values.clamp(old_values - clip_range, old_values + clip_range)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error
