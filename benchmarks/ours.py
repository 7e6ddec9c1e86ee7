"""How this library does the work."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from benchmarks import workload
from benchmarks.worker import Gate
from benchmarks.workload import LONG, PACKED_ROWS, Case
from lightning_rlhf import (
    ConversationDataModule,
    GRPOModule,
    ModelSpec,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from lightning_rlhf.batches import PreferenceBatch
from lightning_rlhf.generation.decode import Decoded


class WaitsAfterIterations(Callback):
    """Waits after every iteration, and knows what was written in it.

    Args:
        gate: At which to wait.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.scored = 0.0
        self.rows: list[tuple[int, int]] = []

    def on_experience(self, trainer: L.Trainer, module: L.LightningModule, experience: Any) -> None:
        """Before the updates."""
        self.scored = self.gate.since_start()
        self.rows = rows_of(experience)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """After them."""
        self.gate.wait(self.rows, **self.known(trainer))

    def known(self, trainer: L.Trainer) -> dict[str, float]:
        """What an iteration took: scoring is all between generation and updates, rewards, reference and advantages.

        Args:
            trainer: That ran it.

        Returns:
            Seconds by phase.
        """
        generate = float(trainer.callback_metrics["time/generate"])
        return {
            "generate": generate,
            "score": self.scored - generate,
            "optimise": self.gate.since_start() - self.scored,
        }


class WaitsAfterSteps(Callback):
    """Waits after every optimizer step.

    Args:
        gate: At which to wait.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """After a step."""
        self.gate.wait(rows_of(batch), optimise=self.gate.since_start())


def rows_of(batch: Any) -> list[tuple[int, int]]:
    """Tokens of prompt and response of every row.

    Args:
        batch: With their masks.

    Returns:
        Both numbers, row by row.
    """
    batch = batch.rows() if isinstance(batch, PreferenceBatch) else batch
    return list(zip(batch.prompt_mask.sum(1).tolist(), batch.response_mask.sum(1).tolist(), strict=True))


def module_of(case: Case) -> L.LightningModule:
    """The module of a row, with the settings that every system gets.

    Args:
        case: What is done.

    Returns:
        The module.
    """
    spec = ModelSpec(case.folder, num_layers_unfrozen=case.num_layers_unfrozen)
    shared: dict[str, Any] = {
        "optimizer": functools.partial(torch.optim.AdamW, lr=workload.LEARNING_RATE, fused=True),
        "seed": 0,
        "compile": case.compiles,
    }
    if case.row == "generate" and case.network.on_gpu:
        spec.dtype = "bfloat16"
    if case.row.startswith("sft") or case.row == "generate":
        return SFTModule(spec, **shared)
    if case.row == "reward":
        return RewardModule(spec, **shared)

    def score(prompts: list[str], responses: list[str], response_tokens: list[Tensor]) -> list[float]:
        return workload.reward([row.tolist() for row in response_tokens], case.network)

    shared |= {
        "reward": score,
        "sampling": {"max_new_tokens": case.max_new_tokens, "temperature": 1.0},
        "num_epochs": case.epochs,
        "minibatch_size": case.minibatch_size,
        "micro_batch_size": case.micro_batch_size or (1 if case.row in LONG else None),
        "micro_batch_tokens": case.micro_batch_tokens or None,
    }
    if case.row == "ppo":
        return PPOModule(spec, kl_coef=workload.KL_COEF, gamma=1.0, gae_lambda=0.95, **shared)
    return GRPOModule(spec, group_size=case.group_size, kl_coef=0.0, **shared)


def fit(case: Case, module: L.LightningModule, callback: Callback) -> None:
    """Trains until there is no more data, or the callback ends it.

    Args:
        case: What is done.
        module: Of :func:`module_of`.
        callback: That watches.
    """
    quiet()
    data: L.LightningDataModule
    if case.row in ("sft", "sft_8k"):
        data = ConversationDataModule(case.examples(), batch_size=case.rows, shuffle=False)
    elif case.row == "reward":
        data = PreferenceDataModule(case.pairs(), batch_size=workload.BATCH, shuffle=False)
    elif case.row == "sft_packed":
        room = PACKED_ROWS * case.max_length
        data = ConversationDataModule(case.examples(), batch_tokens=room, shuffle=False)
    else:
        data = PromptDataModule(case.prompts(), batch_size=case.rows // case.group_size, shuffle=False)
    trainer = L.Trainer(
        accelerator="gpu" if case.network.on_gpu else "cpu",
        precision="bf16-mixed" if case.network.on_gpu else "32-true",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, datamodule=data)


def online(case: Case, gate: Gate) -> None:
    """Iterations of an online module.

    Args:
        case: What is done.
        gate: Where to wait between them.
    """
    fit(case, module_of(case), WaitsAfterIterations(gate))


def given(case: Case, gate: Gate) -> None:
    """The same on responses that are there already: random tokens, all of full length.

    Args:
        case: What is done.
        gate: Where to wait between iterations.
    """
    module: Any = module_of(case)

    def decode(prompt_tokens: Tensor, prompt_mask: Tensor, *args: Any, **kwargs: Any) -> Decoded:
        shape = (len(prompt_tokens) * case.group_size, case.max_new_tokens)
        tokens = torch.randint(workload.UNK + 1, case.network.vocabulary, shape, device=prompt_tokens.device)
        nothing = torch.zeros(shape, device=tokens.device)
        return Decoded(tokens, nothing == 0, nothing, nothing[:, 0] == 0, None, None, None)

    module.decode = decode
    fit(case, module, WaitsAfterIterations(gate))


def offline(case: Case, gate: Gate) -> None:
    """Steps of an offline module.

    Args:
        case: What is done.
        gate: Where to wait between them.
    """
    fit(case, module_of(case), WaitsAfterSteps(gate))


def generate(case: Case, gate: Gate) -> None:
    """From prompts to responses, both as text.

    Args:
        case: What is done.
        gate: Where to wait between batches.
    """
    quiet()
    module: Any = module_of(case)
    sampling = {"max_new_tokens": case.max_new_tokens, "temperature": 1.0}
    rows: list[tuple[int, int]] = []
    module.configure_model()
    if case.network.on_gpu:
        module.cuda()
    decode = module.decode

    def watched(prompt_tokens: Tensor, prompt_mask: Tensor, *args: Any) -> Any:
        decoded = decode(prompt_tokens, prompt_mask, *args)
        rows[:] = zip(prompt_mask.sum(1).tolist(), decoded.mask.sum(1).tolist(), strict=True)
        return decoded

    module.decode = watched
    prompts = case.prompts()
    for start in range(0, len(prompts), workload.BATCH):
        module.generate(prompts[start : start + workload.BATCH], sampling, batch_size=workload.BATCH, seed=start)
        gate.wait(rows, generate=gate.since_start())


def quiet() -> None:
    """Leaves the table to speak."""
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


RUNS = {
    "ppo": online,
    "grpo": online,
    "grpo_mu": online,
    "sft": offline,
    "sft_packed": offline,
    "sft_8k": offline,
    "grpo_16k": given,
    "reward": offline,
    "generate": generate,
}
"""How each row is run."""
