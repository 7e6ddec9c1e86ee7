"""The two stages of the example: imitate words that were put in order, then learn from a score to get all of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lightning_rlhf import PPOModule, SFTModule
from lightning_rlhf.examples.randomwalks.training import Curve, adamw, quiet_trainer
from lightning_rlhf.examples.seq2seq.task import (
    HELD_OUT,
    LENGTHS,
    MODELS,
    Pairs,
    Words,
    measure,
    score,
    tokenizer,
    words,
)

SAMPLING = {"max_new_tokens": LENGTHS[1] + 2}


def warm_start(model: str, folder: Path, seed: int, epochs: int = 4, **flags: Any) -> None:
    """Trains a random network to put letters in order, by imitation; it ends too early to get all words right.

    Args:
        model: A key of ``MODELS``.
        folder: Where the network is saved to.
        seed: Of weights, order and dropout.
        epochs: Passes over the words.
        **flags: Of the Trainer.
    """
    module = SFTModule(
        MODELS[model](),
        tokenizer=tokenizer(),
        disable_dropout=True,
        optimizer=functools.partial(adamw, lr=2e-3),
        lr_scheduler="linear",
        warmup_updates=20,
        seed=seed,
    )
    quiet_trainer(max_epochs=epochs, logger=False, **flags).fit(module, datamodule=Pairs())
    module.save_pretrained(folder)


def learn(folder: Path, seed: int, iterations: int = 40, **flags: Any) -> tuple[PPOModule, Curve]:
    """Trains the network of a folder on the score of what it writes, by PPO.

    Args:
        folder: What to start from.
        seed: Of everything random.
        iterations: How often words are put in order and learnt from.
        **flags: Of the Trainer.

    Returns:
        The module, and its curve.
    """
    curve = Curve()
    module = PPOModule(
        folder,
        reward=score,
        sampling=SAMPLING,
        optimizer=functools.partial(adamw, lr=1e-3),
        lr_scheduler="linear",
        minibatch_size=128,
        kl_coef=0.0,
        seed=seed,
    )
    callbacks = [curve, *flags.pop("callbacks", [])]
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, limit_val_batches=0, **flags)
    trainer.fit(module, datamodule=Words(iterations))
    return module, curve


def evaluate(module: Any) -> tuple[float, float, float]:
    """Scores what a network writes to words that it has not seen.

    Args:
        module: With a ``generate``.

    Returns:
        The mean score of a sample for each word, and which share of them is right; and which share of the likeliest is.
    """
    unseen = words(HELD_OUT, seed=3)
    sampled, likeliest = (module.generate(unseen, {**SAMPLING, "temperature": t}, batch_size=200) for t in (1.0, 0.0))
    exact = [sum(measure(unseen, written)["exact"]) / HELD_OUT for written in (sampled, likeliest)]
    return sum(score(unseen, sampled)) / HELD_OUT, exact[0], exact[1]
