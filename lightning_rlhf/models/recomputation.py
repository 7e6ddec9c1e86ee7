"""Activations that are computed twice rather than held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_rlhf.models.adapters import Adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute_activations(model: PreTrainedModel, adapters: Adapters | None = None) -> None:
    """Lets every block hold only what it reads, and compute the rest again in the backward pass.

    transformers does so in training mode alone; responses are written in evaluation mode, from the cache.

    Args:
        model: Changed in place.
        adapters: Its own, if there are passes with several: a block runs again with the one with which it ran.

    Raises:
        ValueError: If its blocks cannot.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None)  # the older name is deprecated where it is
    enable = enable or model.gradient_checkpointing_enable
    # Not reentrant, so that it does not matter that what a block reads has no gradient.
    options: dict[str, Any] = {"use_reentrant": False}
    if adapters is not None:
        options["context_fn"] = adapters.repeated
    try:
        enable(options)
    except ValueError as error:
        raise ValueError(
            f"`gradient_checkpointing=True`: the blocks of {type(model).__name__} hold their activations, and nothing "
            "else is possible in transformers: leave it out, and use a smaller `micro_batch_size`."
        ) from error
    # transformers gives it one all the same, and frozen blocks below would then take part in the backward pass.
    model.disable_input_require_grads()
