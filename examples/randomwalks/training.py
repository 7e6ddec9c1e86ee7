"""The two stages of the example: imitate random walks, then learn by PPO to take the shortest."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_rlhf import ConversationDataModule, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.examples.randomwalks.task import MAX_NODES, RandomWalks

adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=1e-6, fused=True)


@dataclass(frozen=True)
class Recipe:
    """How the policy learns within 2,800 episodes.

    Args:
        iterations: How often episodes are collected and learnt from.
        episodes_per_start: Episodes of an iteration from each of the 20 starts.
        arguments: Of :class:`PPOModule`, where they are not its defaults.
    """

    iterations: int
    episodes_per_start: int
    arguments: dict[str, Any]


TRLX = Recipe(
    iterations=20,
    episodes_per_start=7,
    arguments={
        "optimizer": functools.partial(adamw, lr=3e-4),
        "minibatch_size": 100,
        "vf_coef": 1.2,
        "reward_clip": 1.0,
        "kl_coef": 0.0,
    },
)
"""PPO as `trlX's example <https://github.com/CarperAI/trlx/tree/main/examples/randomwalks>`_ configures it."""

OWN = Recipe(
    iterations=46,
    episodes_per_start=3,
    arguments={**TRLX.arguments, "minibatch_size": 60, "lr_scheduler": "linear"},
)
"""This example's own, chosen on other graphs than the one that it shows: smaller iterations, and a rate that falls."""


class Curve(Callback):
    """Remembers the mean reward of every iteration.

    Attributes:
        rewards: One an iteration.
    """

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Called when an iteration is over."""
        self.rewards.append(float(trainer.callback_metrics["reward/mean"]))


def quiet_trainer(**flags: Any) -> L.Trainer:
    """A Trainer that says no more than its progress bar."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # between Lightning and torch
    flags = {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 1, **flags}
    return L.Trainer(accelerator="cpu", devices=1, **flags)


def warm_start(task: RandomWalks, folder: Path, seed: int, epochs: int = 10, **flags: Any) -> None:
    """Trains a random network to walk at random, by imitation.

    Args:
        task: The graph and its walks.
        folder: Where the network is saved to.
        seed: Of weights, order and dropout.
        epochs: Passes over the 1,000 walks.
        **flags: Of the Trainer.
    """
    walks = [{"prompt": walk[0], "response": walk[1:]} for walk in task.walks]
    module = SFTModule(
        task.config(),
        tokenizer=task.tokenizer(),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
        lr_scheduler="linear",
        seed=seed,
    )
    data = ConversationDataModule(walks, batch_size=25, seed=seed)
    quiet_trainer(max_epochs=epochs, logger=False, **flags).fit(module, datamodule=data)
    module.save_pretrained(folder)


def ppo(
    task: RandomWalks, folder: Path, seed: int, recipe: Recipe, iterations: int | None = None, **flags: Any
) -> tuple[PPOModule, list[float]]:
    """Trains the network of a folder by PPO.

    Args:
        task: Whose score is the reward.
        folder: What to start from.
        seed: Of everything random.
        recipe: How.
        iterations: Other than the recipe's.
        **flags: Of the Trainer.

    Returns:
        The module, and the mean reward of every iteration.
    """
    module = PPOModule(
        folder, reward=task.score, sampling={"max_new_tokens": MAX_NODES - 1}, seed=seed, **recipe.arguments
    )
    starts = task.prompts * recipe.episodes_per_start
    data = PromptDataModule(starts * (iterations or recipe.iterations), batch_size=len(starts), shuffle=False)
    curve = Curve()
    quiet_trainer(max_epochs=1, callbacks=[curve, *flags.pop("callbacks", [])], **flags).fit(module, datamodule=data)
    return module, curve.rewards


def evaluate(module: Any, task: RandomWalks, samples: int = 64) -> tuple[float, float]:
    """Scores what a network writes.

    Args:
        module: With a ``generate``.
        task: Whose starts and score are used.
        samples: Responses drawn for each start.

    Returns:
        The mean score of the samples, and that of the likeliest response to each start.
    """
    means = []
    for prompts, temperature in ((task.prompts * samples, 1.0), (task.prompts, 0.0)):
        sampling = {"max_new_tokens": MAX_NODES - 1, "temperature": temperature}
        scores = task.score(prompts, module.generate(prompts, sampling, batch_size=320))
        means.append(sum(scores) / len(scores))
    return means[0], means[1]
