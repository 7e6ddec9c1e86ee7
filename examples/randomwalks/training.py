"""The two stages of the example: imitate random walks, then learn from a score to take the shortest."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_rlhf import GRPOModule, ModelSpec, PPOModule, PromptDataModule
from lightning_rlhf.examples.randomwalks.task import MAX_NODES, RandomWalks
from lightning_rlhf.examples.runs import Curve, imitate, quiet_trainer

adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=1e-6, fused=True)


@dataclass(frozen=True)
class Recipe:
    """How the policy learns within 2,800 episodes.

    Args:
        name: As tables and curves have it.
        algorithm: The class of its module.
        iterations: How often episodes are collected and learnt from.
        prompts: Of an iteration: so many starts, all of them in turn.
        arguments: Of the module, where they are not its defaults.
        model: Of :class:`ModelSpec`, likewise.
    """

    name: str
    algorithm: type[PPOModule] | type[GRPOModule]
    iterations: int
    prompts: int
    arguments: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def episodes(self) -> int:
        """Of an iteration."""
        return self.prompts * self.arguments.get("group_size", 1)


TRLX = Recipe(
    name="PPO as trlX configures it",
    algorithm=PPOModule,
    iterations=20,
    prompts=140,
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
    name="PPO",
    algorithm=PPOModule,
    iterations=46,
    prompts=60,
    arguments={**TRLX.arguments, "minibatch_size": 60, "lr_scheduler": "linear"},
)
"""This example's own, chosen on other graphs than the one that it shows: smaller iterations, and a rate that falls."""

TOP_LAYERS = Recipe(
    name="PPO, 2 of 6 layers",
    algorithm=PPOModule,
    iterations=OWN.iterations,
    prompts=OWN.prompts,
    arguments={**OWN.arguments, "optimizer": functools.partial(adamw, lr=1e-3)},
    model={"num_layers_unfrozen": 2},
)
"""The same where only the top two layers learn, at a rate chosen on other graphs as well."""

LORA = Recipe(
    name="PPO, LoRA of rank 8",
    algorithm=PPOModule,
    iterations=OWN.iterations,
    prompts=OWN.prompts,
    arguments={**OWN.arguments, "optimizer": functools.partial(adamw, lr=1e-3)},
    model={"adapter": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
)
"""The same where the network that has imitated is frozen, and an adapter learns beside every linear layer."""

GRPO = Recipe(
    name="GRPO",
    algorithm=GRPOModule,
    iterations=40,
    prompts=10,
    arguments={
        "group_size": 7,
        "optimizer": functools.partial(adamw, lr=3e-4),
        "lr_scheduler": "linear",
        "num_epochs": 4,
        "minibatch_size": 70,
        "reward_clip": 1.0,
        "kl_coef": 0.0,
    },
)
"""Half of the starts at a time, seven episodes from each; chosen on other graphs as well."""

RECIPES = {"ppo": OWN, "ppo-top-layers": TOP_LAYERS, "ppo-lora": LORA, "grpo": GRPO}
"""By the names that the command line knows."""


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
    imitate(task.config(), task.tokenizer(), walks, folder, seed, epochs, **flags)


def learn(
    task: RandomWalks, folder: Path, seed: int, recipe: Recipe, iterations: int | None = None, **flags: Any
) -> tuple[Any, Curve]:
    """Trains the network of a folder on the score of what it writes.

    Args:
        task: Whose score is the reward.
        folder: What to start from.
        seed: Of everything random.
        recipe: How.
        iterations: Other than the recipe's.
        **flags: Of the Trainer.

    Returns:
        The module, and its curve, whose seconds count loading too.
    """
    curve = Curve()
    policy = ModelSpec(folder, **recipe.model)
    sampling = {"max_new_tokens": MAX_NODES - 1}
    module = recipe.algorithm(policy, reward=task.score, sampling=sampling, seed=seed, **recipe.arguments)
    needed = (iterations or recipe.iterations) * recipe.prompts
    starts = (task.prompts * (needed // len(task.prompts) + 1))[:needed]
    data = PromptDataModule(starts, batch_size=recipe.prompts, shuffle=False)
    quiet_trainer(max_epochs=1, callbacks=[curve, *flags.pop("callbacks", [])], **flags).fit(module, datamodule=data)
    return module, curve


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
