"""How much of the data is in the weights, also while a batch or a window of them is under way."""

from __future__ import annotations

from typing import Any

import lightning as L


def settled_batches(trainer: L.Trainer) -> int:
    """Batches of the present epoch that are finished.

    Whatever else was read has left nothing in the weights yet: a batch whose step was interrupted, and the batches of
    an accumulation window that is still open. Their gradients are in no checkpoint.

    Args:
        trainer: That fits, or has.

    Returns:
        The number.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.current
    if progress.ready == progress.processed and not loop._should_accumulate():
        return progress.processed
    return progress.processed - progress.processed % trainer.accumulate_grad_batches


def settle(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Makes a checkpoint's counters say what its weights say, so that Lightning goes on with the right batch.

    An epoch whose batches are all done is over, and the next one is to come: read back as Lightning writes it, it has
    one batch more under ``max_steps``, and counts for two once a run was resumed twice. An epoch that ``max_steps`` cut
    short is not over. A validation under way is left to be finished.

    Args:
        trainer: That writes it.
        checkpoint: Changed in place.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    done = settled_batches(trainer)
    unfinished = batches["current"]["ready"] - done
    is_over = not unfinished and (batches["is_last_batch"] or done >= trainer.num_training_batches)
    has_ended = epochs["current"]["started"] == epochs["current"]["processed"]  # as Lightning counts
    if trainer.validating or not epochs["current"]["started"] or not (is_over or unfinished or has_ended):
        return
    _set(batches["total"], batches["total"]["ready"] - unfinished)
    _set(batches["current"], 0 if is_over else done)
    batches["is_last_batch"] = False
    for progress in (epochs["total"], epochs["current"]):
        if is_over:
            _set(progress, progress["started"])
        else:
            progress["processed"] = progress["completed"] = progress["started"] - 1


def go_on_with_a_new_epoch(trainer: L.Trainer) -> None:
    """An epoch that has not begun is not restarted: Lightning would look for a validation that is due before it.

    Args:
        trainer: That is about to train, everything restored.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.restarting and loop.batch_progress.current.completed == 0:
        loop.restarting = False


def count_logged(trainer: L.Trainer) -> None:
    """Puts Lightning's x axis right, which a resumed run that validates between batches may have one too far.

    Args:
        trainer: At the start of a batch.
    """
    loop = trainer.fit_loop.epoch_loop
    automatic = trainer.lightning_module.automatic_optimization
    loop._batches_that_stepped = loop.global_step if automatic else loop.total_batch_idx


def _set(counts: dict[str, int], number: int) -> None:
    for name in counts:
        counts[name] = number
