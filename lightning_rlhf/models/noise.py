"""Noise in what a model reads, so that it imitates less literally."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lightning_rlhf.models.reading import Reading, Responses


@contextmanager
def noisy(model: Any, reading: Reading, batch: Responses, alpha: float) -> Iterator[None]:
    r"""Adds noise to a model's input embeddings for a pass.

    .. math:: \frac{\alpha}{\sqrt{L d}} \epsilon, \qquad \epsilon \sim \mathrm{Uniform}(-1, 1)

    with :math:`L` the real tokens of the row, prompt and response, and :math:`d` the width (algorithm 1 of `NEFTune
    <https://arxiv.org/abs/2310.05914>`_). It comes from the global generator, and has no gradient.

    Args:
        model: A decoder of transformers.
        reading: What is read.
        batch: Of which it was made.
        alpha: How much, :math:`\alpha`.
    """
    lengths = row_lengths(reading, batch).to(reading.tokens.device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        noise = torch.empty(output.shape, dtype=torch.float32, device=output.device).uniform_(-1.0, 1.0)
        scale = alpha / (lengths * output.shape[-1]).sqrt()
        return output + (noise * scale[..., None]).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def row_lengths(reading: Reading, batch: Responses) -> Int[Tensor, "rows columns"]:
    """How many tokens the row has, of each that is read.

    Args:
        reading: Rows side by side, or one behind the other.
        batch: Of which it was made.

    Returns:
        Prompt and response together, the last token included, which is predicted and not read; of a prompt that several
        rows share the longest row.
    """
    if reading.mask.dim() == 2:
        lengths = batch.prompt_mask.sum(1) + batch.response_mask.sum(1)
        return lengths[:, None].expand_as(reading.tokens)
    own, before = reading.mask[0, 0].unbind(1)
    total = own + torch.where(before >= 0, own[before.clamp(min=0)], 0)
    shared = before >= 0
    total = total.scatter_reduce(0, before[shared], total[shared], "amax")
    return total.repeat_interleave(own)[None] + 1
