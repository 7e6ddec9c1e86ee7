"""The two stages of the example: imitate a careless writer, then learn from a score to sort without slips."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.examples.runs import Curve, imitate, quiet_trainer
from lightning_rlhf.examples.seq2seq.task import LENGTHS, Sorting

EPISODES = 256  # of an iteration
ITERATIONS = 24
EPOCHS = 8  # of imitation
SAMPLING = {"max_new_tokens": max(LENGTHS) + 2}
ARGUMENTS: dict[str, Any] = {
    "optimizer": functools.partial(torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.95), weight_decay=1e-6, fused=True),
    "lr_scheduler": "linear",
    "minibatch_size": 64,
    "kl_coef": 0.0,
}
"""Of the module, where they are not its defaults."""


def warm_start(task: Sorting, shape: str, folder: Path, seed: int, epochs: int = EPOCHS, **flags: Any) -> None:
    """Trains a random network to sort as the demonstrations do, by imitation.

    Args:
        task: With the demonstrations.
        shape: Of the network, ``"t5"`` or ``"bart"``.
        folder: Where the network is saved to.
        seed: Of weights, order and dropout.
        epochs: Passes over the demonstrations.
        **flags: Of the Trainer.
    """
    imitate(task.config(shape), task.tokenizer(), task.demonstrations, folder, seed, epochs, batch_size=100, **flags)


def learn(
    task: Sorting, folder: Path, seed: int, iterations: int = ITERATIONS, **flags: Any
) -> tuple[PPOModule, Curve]:
    """Trains the network of a folder on the score of what it writes, by PPO.

    Args:
        task: Whose score is the reward.
        folder: What to start from.
        seed: Of everything random.
        iterations: How often episodes are collected and learnt from.
        **flags: Of the Trainer.

    Returns:
        The module, and its curve.
    """
    curve = Curve()
    module = PPOModule(folder, reward=task.score, sampling=SAMPLING, seed=seed, **ARGUMENTS)
    data = PromptDataModule(task.prompts[: iterations * EPISODES], batch_size=EPISODES, shuffle=False)
    quiet_trainer(max_epochs=1, callbacks=[curve, *flags.pop("callbacks", [])], **flags).fit(module, datamodule=data)
    return module, curve


def evaluate(module: Any, task: Sorting) -> tuple[float, float]:
    """Scores what a network writes for the words that were held out.

    Args:
        module: With a ``generate``.
        task: Whose words and score are used.

    Returns:
        The mean score of four samples a word, and that of the likeliest response to each.
    """
    means = []
    for words, temperature in ((task.held_out * 4, 1.0), (task.held_out, 0.0)):
        responses = module.generate(words, {**SAMPLING, "temperature": temperature}, batch_size=EPISODES)
        scores = task.score(words, responses)
        means.append(sum(scores) / len(scores))
    return means[0], means[1]
