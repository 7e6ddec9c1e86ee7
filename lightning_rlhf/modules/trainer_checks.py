"""What a Trainer is given that cannot work with updates by hand, refused by name."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.utilities import rank_zero_warn

_REMEDIES: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "give the module a `micro_batch_size` smaller than `minibatch_size`",
    StochasticWeightAveraging: "leave it out, and let `lr_scheduler` take the learning rate down",
    LearningRateFinder: "leave it out, and compare short runs",
    BatchSizeFinder: "leave it out: memory depends on the module's `micro_batch_size`",
}
"""Callbacks that take a batch for an optimizer step of Lightning's, and what to do instead."""


def check_flags(trainer: L.Trainer, module: str) -> None:
    """Refuses flags that do not reach the updates.

    Args:
        trainer: Whose flags they are.
        module: The name of the module's class.

    Raises:
        ValueError: If one is set, with the argument to use instead.
    """
    if trainer.gradient_clip_val is not None:
        raise ValueError(
            f"`Trainer(gradient_clip_val={trainer.gradient_clip_val})` does not reach the updates of {module}: give it "
            f"`max_grad_norm={trainer.gradient_clip_val}` instead."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"`Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})` does not reach the updates of "
            f"{module}: give it a `micro_batch_size` smaller than `minibatch_size` instead."
        )


def check_precision(trainer: L.Trainer) -> None:
    """Refuses Lightning's quantisation, which takes every linear layer of a module.

    Args:
        trainer: Whose precision it is.

    Raises:
        ValueError: If it quantises, with what to use instead.
    """
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise ValueError(
            "`Trainer(plugins=BitsandbytesPrecision(...))` would quantise every linear layer of the module, value head "
            "and adapter too, and train none of them: leave it out, and pass "
            "`ModelSpec(..., quantization='nf4', adapter=...)`."
        )


def check_callbacks(trainer: L.Trainer, module: str) -> None:
    """Refuses callbacks of Lightning's, and arguments of them, that do not work when an iteration makes many updates.

    Args:
        trainer: Whose callbacks they are.
        module: The name of the module's class.

    Raises:
        ValueError: If there is one, with what to use instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, remedy in _REMEDIES.items():
            if isinstance(callback, kind):
                raise ValueError(f"`{kind.__name__}` does not work with the updates of {module}: {remedy}.")
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise ValueError(
                f"`ModelCheckpoint(train_time_interval={callback._train_time_interval!r})` would never save {module}: "
                "use `lightning_rlhf.callbacks.RolloutCheckpoint(train_time_interval=...)`."
            )


def warn_of_missed_checkpoints(trainer: L.Trainer, module: str, updates_before: int) -> None:
    """Says so where Lightning's ``ModelCheckpoint`` was due within an iteration and looks after it only.

    Args:
        trainer: Whose callbacks they are.
        module: The name of the module's class.
        updates_before: That were made before the iteration.
    """
    updates = trainer.global_step
    for callback in trainer.checkpoint_callbacks:
        every = getattr(callback, "_every_n_train_steps", 0)
        if every and updates % every and updates // every > updates_before // every:
            rank_zero_warn(
                f"`ModelCheckpoint(every_n_train_steps={every})` missed a checkpoint: it counts the updates of "
                f"{module} and looks after an iteration, which makes several, so that it saves only where their number "
                "is then a multiple. Use `lightning_rlhf.callbacks.RolloutCheckpoint(every_n_rollouts=...)`, which "
                "counts iterations."
            )
