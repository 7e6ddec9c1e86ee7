"""Activations that are computed twice rather than held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_rlhf.models.adapters import Adapters
from lightning_rlhf.models.attention import attention_kernels

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
    try:
        enable({"use_reentrant": False, "context_fn": partial(_contexts, adapters)})
    except ValueError as error:
        raise ValueError(
            f"`gradient_checkpointing=True`: the blocks of {type(model).__name__} hold their activations, and nothing "
            "else is possible in transformers: leave it out, and use a smaller `micro_batch_size`."
        ) from error
    # transformers gives it one all the same, and frozen blocks below would then take part in the backward pass.
    model.disable_input_require_grads()


def _contexts(adapters: Adapters | None) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of a pass that begins now, and of its repetition."""
    first, again = (nullcontext(), nullcontext()) if adapters is None else adapters.repeated()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return first, _repetition(again, attention_kernels(device))


@contextmanager
def _repetition(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """A pass that is made again in the backward pass: with the adapter and kernels that it had, or it would differ."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
