"""Short runs of a module under a bare Trainer, and callbacks that look into them."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_rlhf import PromptDataModule, SFTModule
from tests.networks import tiny_gpt2, word_tokenizer

PROMPTS = ["a b c", "d", "e f", "b a a c", "c", "f e d"]
sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def share_of_early_letters(prompts, responses):
    """A reward in [0, 1] that most responses differ in."""
    words = [response.split() for response in responses]
    return [sum(word < "k" for word in row) / max(len(row), 1) for row in words]


class Seen(Callback):
    """Keeps every iteration's experience and every optimizer step's gradient norm."""

    def __init__(self) -> None:
        self.experiences: list[Any] = []
        self.metrics: list[dict[str, float]] = []

    def on_experience(self, trainer, module, experience) -> None:
        self.experiences.append(experience)

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def bare_trainer(**flags: Any) -> L.Trainer:
    """One CPU, nothing printed, nothing written."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**quiet, **flags})


def module_of(cls: type, policy: Any = None, **arguments: Any) -> Any:
    """An online module on a tiny GPT-2, responses of up to six tokens."""
    defaults: dict[str, Any] = {
        "tokenizer": word_tokenizer(),
        "reward": share_of_early_letters,
        "sampling": {"max_new_tokens": 6},
        "minibatch_size": 4,
        "optimizer": sgd,
    }
    return cls(policy or tiny_gpt2(initializer_range=0.3), **{**defaults, **arguments})


def sft(policy: Any = None, **arguments: Any) -> SFTModule:
    """An SFT module on a tiny GPT-2."""
    return SFTModule(policy or tiny_gpt2(), **{"tokenizer": word_tokenizer(), **arguments})


def fit(module: Any, iterations: int = 3, prompts: list[Any] | None = None, **flags: Any) -> Seen:
    """Trains on all prompts in every iteration.

    Returns:
        What was seen on the way.
    """
    prompts = prompts or PROMPTS
    seen = Seen()
    callbacks = [*flags.pop("callbacks", []), seen]
    data = PromptDataModule(prompts, batch_size=len(prompts))
    bare_trainer(max_epochs=iterations, callbacks=callbacks, **flags).fit(module, datamodule=data)
    return seen


def weights(module: Any) -> torch.Tensor:
    """All of a module's parameters, one after the other."""
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])
