"""What a policy writes to the prompts that it is validated on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_rlhf.batches import ImitationBatch
from lightning_rlhf.callbacks.sample_table import check_counts, log_samples, show
from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.modules.ranks import most_over_ranks, rank, world_size


class ValidationSamples(Callback):
    """Shows, at every validation of an :class:`SFTModule`, what the policy writes to the first prompts.

    A row is a prompt, what was written, and what the data has there. Responses are drawn as ``evaluation_sampling``
    says, from chance that depends on seed and row alone: what differs from one validation to the next was learnt, and
    training is the same with and without. The table goes where that of :class:`SampleTable` goes, under ``samples``;
    the x axis is the number of updates.

    Args:
        num_rows: Of process 0, from its first.
        console: Whether to print.
        max_characters: Of a text on the console; the loggers get all.
    """

    def __init__(self, num_rows: int = 4, console: bool = True, max_characters: int = 400) -> None:
        check_counts(num_rows, max_characters)
        self.num_rows = num_rows
        self.console = console
        self.max_characters = max_characters

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Writes to the first rows of the first batch; all processes do, since the policy may be sharded."""
        is_first = batch_idx == dataloader_idx == 0 and not trainer.sanity_checking
        if not is_first or not isinstance(batch, ImitationBatch):
            return
        batch = batch.select(torch.arange(min(self.num_rows, len(batch)), device=batch.prompt_mask.device))
        texts = written(module, batch)
        if not trainer.is_global_zero:
            return
        wanted = module.texts(batch.response_tokens, batch.response_mask)
        prompts = module.texts(batch.prompt_tokens, batch.prompt_mask)
        columns, rows = ["prompt", "response", "data"], [list(row) for row in zip(prompts, texts, wanted, strict=True)]
        if self.console:
            show(f"Samples after {trainer.global_step} updates", columns, rows, self.max_characters)
        for logger in trainer.loggers:
            log_samples(logger, columns, rows, trainer.global_step)


def written(module: Any, batch: ImitationBatch) -> list[str]:
    """What a policy writes to the prompts of a validation's first batch, as far as it has room for that.

    Args:
        module: With the policy.
        batch: Its first rows, of this process.

    Returns:
        A text each.
    """
    width = int(batch.prompt_mask.sum(1).max())
    sampling, decoder = module.evaluation_sampling, module.policy.decoder
    # Processes that gather weights for every token write equally long.
    widest = most_over_ranks(width, batch.prompt_mask.device)
    room = decoder.response_room if decoder.has_encoder else decoder.prompt_room(widest)
    if room is not None and room < sampling.max_new_tokens:
        fewer = {"max_new_tokens": room, "min_new_tokens": min(sampling.min_new_tokens, room)}
        sampling = sampling.but(fewer, "evaluation_sampling")
    numbers = [j * world_size() + rank() for j in range(len(batch))]
    uniforms = row_uniforms(module.seed, "evaluate", (0,), numbers, sampling.max_new_tokens)
    decoded = module.decode(batch.prompt_tokens[:, -width:], batch.prompt_mask[:, -width:], uniforms, sampling)
    return module.texts(decoded.tokens, decoded.mask)
