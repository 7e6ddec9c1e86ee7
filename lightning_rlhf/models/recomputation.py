"""Activations that are computed twice rather than held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute_activations(model: PreTrainedModel) -> None:
    """Lets every block hold only what it reads, and compute the rest again in the backward pass.

    transformers does so in training mode alone; responses are written in evaluation mode, from the cache.

    Args:
        model: Changed in place.

    Raises:
        ValueError: If its blocks cannot.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None)  # the older name is deprecated where it is
    enable = enable or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})  # by which it does not matter that what a block reads has no gradient
    except ValueError as error:
        raise ValueError(
            f"`gradient_checkpointing=True`: the blocks of {type(model).__name__} hold their activations, and nothing "
            "else is possible in transformers: leave it out, and use a smaller `micro_batch_size`."
        ) from error
    # transformers gives it one all the same, and frozen blocks below would then take part in the backward pass.
    model.disable_input_require_grads()
