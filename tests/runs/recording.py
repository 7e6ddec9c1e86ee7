"""Runs that can be cut anywhere and gone on with, and everything that two of them must have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from lightning_rlhf import ConversationDataModule, GRPOModule, ModelSpec, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.models.reference import fingerprint
from tests.networks import ENCODER_DECODERS
from tests.training import bare_trainer, module_of, sft

PROMPTS = ["a b c", "d", "e f", "b a a c", "c", "f e d", "b"]  # three batches of three, the last of one
TEXTS = ["a b c d", "b c", "c d e f g", "h", "k l m", "n o p q r s", "t u"]
adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
SCHEDULE = {"optimizer": adamw, "lr_scheduler": "linear", "warmup_updates": 4}


class Memory(Logger):
    """Keeps what is logged, with the place on the x axis; timings are nobody's to repeat."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = {name: float(value) for name, value in metrics.items() if not name.startswith(("time/", "speed/"))}
        self.points.append((step, kept))


class Places(Callback):
    """Keeps where the run stands after every batch: data, counters, rates, coefficient."""

    def __init__(self) -> None:
        self.after: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        place = {
            "batch_idx": batch_idx,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "total_batch_idx": trainer.fit_loop.total_batch_idx,
            "data": trainer.datamodule.state_dict(),
            "rows": batch.prompt_tokens.tolist(),
            "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "weights": fingerprint(module.policy),
        }
        if hasattr(module, "iteration"):
            moments = module.scaled.state_dict()
            place |= {"iteration": module.iteration, "kl_coef": module.kl_coef, "moments": moments}
        self.after.append(place)


class Dearer(Callback):
    """Changes the price of divergence on the way, as a controller does."""

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if hasattr(module, "kl_coef"):
            module.kl_coef *= 1.1


def validated(cls: type) -> type:
    """The same module, with a validation that draws from the global generator and changes nothing."""

    class Validated(cls):
        def validation_step(self, batch, batch_idx):
            torch.rand(3)

    return Validated


def with_validation(cls: type) -> type:
    """The same data, its first rows to validate on."""

    class WithValidation(cls):
        def val_dataloader(self):
            items = [self.tokenized(row, number) for number, row in enumerate(self.rows[:4])]
            return DataLoader(items, batch_size=2, collate_fn=self.collate)

    return WithValidation


@dataclass(frozen=True)
class Case:
    """A module, its data, and what the trainer needs for them.

    Args:
        cls: Of the module.
        data: Of the DataModule.
        rows: That it reads.
        arguments: Of the module.
        flags: Of the trainer.
    """

    cls: type
    data: type = PromptDataModule
    rows: list[str] = field(default_factory=lambda: PROMPTS)
    arguments: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)

    def module(self, with_val: bool = False, **arguments: Any) -> Any:
        """A fresh one."""
        make = sft if issubclass(self.cls, SFTModule) else functools.partial(module_of, self.cls)
        module = make(**{"seed": 5, **SCHEDULE, **self.arguments, **arguments})
        module.__class__ = validated(self.cls) if with_val else self.cls
        return module

    def datamodule(self, with_val: bool = False) -> Any:
        """A fresh one."""
        return (with_validation(self.data) if with_val else self.data)(self.rows, batch_size=3, seed=1)


def t5() -> ModelSpec:
    """An encoder-decoder, of which one block learns."""
    return ModelSpec(ENCODER_DECODERS["t5"](initializer_factor=3.0), num_layers_unfrozen=1)


ONLINE = {"reward_scaling": "running", "normalize_rewards": True, "kl_coef": 0.3, "num_epochs": 2, "minibatch_size": 2}
CASES = {
    "ppo": Case(PPOModule, arguments=ONLINE),
    "grpo": Case(GRPOModule, arguments={**ONLINE, "group_size": 3}),
    "sft": Case(SFTModule, ConversationDataModule, TEXTS),
    "ppo_t5": Case(PPOModule, arguments={**ONLINE, "policy": t5(), "minibatch_size": 4}),
    "sft_accumulating": Case(SFTModule, ConversationDataModule, TEXTS, flags={"accumulate_grad_batches": 2}),
}


@dataclass
class Run:
    """What a run left behind."""

    module: Any
    trainer: Any
    logged: list[tuple[int, dict[str, float]]]
    places: list[dict[str, Any]]


def run(case: Case, ckpt_path: Any = None, with_val: bool = False, callbacks: Any = (), **flags: Any) -> Run:
    """Trains a fresh module under a fresh trainer on fresh data."""
    module, memory, places = case.module(with_val), Memory(), Places()
    torch.rand(7)  # nothing may depend on what was drawn before
    trainer = bare_trainer(
        callbacks=[Dearer(), *callbacks, places],
        logger=memory,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        num_sanity_val_steps=0,
        **{**case.flags, **flags},
    )
    trainer.fit(module, datamodule=case.datamodule(with_val), ckpt_path=ckpt_path)
    return Run(module, trainer, memory.points, places.after)


def checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; it loads without trust."""
    return torch.load(path, weights_only=True)


def assert_same_end(one: Run, other: Run) -> None:
    """Weights and the optimizer's numbers are equal to the bit, and so is the reference."""
    assert fingerprint(one.module.policy) == fingerprint(other.module.policy)
    for state, same in zip(
        *(r.trainer.optimizers[0].state_dict()["state"].values() for r in (one, other)), strict=True
    ):
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(same[name])), name
    if getattr(one.module, "reference", None) is not None:
        assert fingerprint(one.module.reference.network) == fingerprint(other.module.reference.network)


def assert_goes_on(whole: Run, resumed: Run, done: int) -> None:
    """What a resumed run did is what the whole one did after so many batches."""
    assert resumed.places == whole.places[done:]
    assert resumed.logged == whole.logged[len(whole.logged) - len(resumed.logged) :]
    assert_same_end(whole, resumed)
