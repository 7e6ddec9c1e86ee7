"""How TRL does the work; it runs in environments of its own (see :mod:`benchmarks.environments`)."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks import workload
from benchmarks.worker import Gate
from benchmarks.workload import Case


class Waits(TrainerCallback):
    """Waits after so many optimizer steps, with what is known by then.

    Args:
        gate: At which to wait.
        steps: Of an iteration.

    Attributes:
        rows: Of the present iteration.
        scored: Seconds until its updates begin.
    """

    def __init__(self, gate: Gate, steps: int) -> None:
        self.gate = gate
        self.steps = steps
        self.rows: list[tuple[int, int]] = []
        self.scored: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a step, which PPO says once in an iteration."""
        if state.global_step % self.steps:
            return
        if self.scored is None:
            self.gate.wait(self.rows, optimise=self.gate.since_start())
        else:
            score = self.scored - self.gate.phases["generate"]
            self.gate.wait(self.rows, score=score, optimise=self.gate.since_start() - self.scored)


def arguments(case: Case, **more: Any) -> dict[str, Any]:
    """Settings of all trainers: as this library's, and nothing saved or reported.

    Args:
        case: What is done.
        **more: Of one of them.

    Returns:
        Arguments of its config.
    """
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl"),
        "use_cpu": not case.network.on_gpu,
        "bf16": case.network.on_gpu,
        "gradient_checkpointing": False,
        "learning_rate": workload.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "num_train_epochs": 1,
        "seed": 0,
        **more,
    }


def ppo(case: Case, gate: Gate) -> None:
    """PPO, with networks of their own for policy, reference, value and reward.

    Args:
        case: What is done.
        gate: Where to wait between iterations.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(case.folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(case.folder) for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(case.folder, num_labels=1) for _ in range(2))
    data = Dataset.from_dict({"input_ids": tokenizer(case.prompts())["input_ids"]})
    waits = Waits(gate, 1)

    def written(result: Any, model: Any, queries: Any, *_: Any) -> None:
        tokens, _ = result
        width = queries.shape[1]
        prompts = (tokens[:, :width] != workload.PAD).sum(1).tolist()
        waits.rows = [(p, workload.length_of(row[width:])) for p, row in zip(prompts, tokens, strict=True)]

    gate.timed(ppo_trainer, "batch_generation", "generate", written)
    get_reward = ppo_trainer.get_reward

    def scored(model: Any, *args: Any) -> Any:
        before = gate.since_start()
        result = get_reward(model, *args)
        waits.scored = gate.since_start()
        if model is reward:
            gate.phases["reward_model"] = gate.phases.get("reward_model", 0.0) + waits.scored - before
        return result

    ppo_trainer.get_reward = scored
    config = PPOConfig(
        **arguments(case),
        per_device_train_batch_size=workload.BATCH,
        num_mini_batches=workload.BATCH // case.minibatch_size,
        num_ppo_epochs=case.epochs,
        local_rollout_forward_batch_size=workload.BATCH,
        num_sample_generations=0,
        response_length=case.max_new_tokens,
        stop_token="eos" if case.lengths == "ragged" else None,
        temperature=1.0,
        kl_coef=workload.KL_COEF,
        gamma=1.0,
        lam=0.95,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        callbacks=[waits],
    )
    # Its own loader shuffles; the others take the prompts in order.
    trainer.dataloader = DataLoader(data, batch_size=workload.BATCH, collate_fn=trainer.data_collator, drop_last=True)
    trainer.train()


def grpo(case: Case, gate: Gate) -> None:
    """GRPO, with one update or several epochs of minibatches.

    Args:
        case: What is done.
        gate: Where to wait between iterations.
    """
    from trl import GRPOConfig, GRPOTrainer

    per_epoch = workload.BATCH // case.minibatch_size
    waits = Waits(gate, per_epoch * case.epochs)
    tokenizer = AutoTokenizer.from_pretrained(case.folder)

    def score(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return workload.reward(completion_ids, case.network)

    config = GRPOConfig(
        **arguments(case),
        per_device_train_batch_size=case.minibatch_size,
        steps_per_generation=per_epoch,
        num_iterations=case.epochs,
        num_generations=case.group_size,
        max_completion_length=case.max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        shuffle_dataset=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(case.folder),
        args=config,
        processing_class=tokenizer,
        reward_funcs=score,
        train_dataset=Dataset.from_dict({"prompt": case.prompts()}),
        callbacks=[waits],
    )

    def ready(result: dict[str, Any], *_: Any) -> None:
        waits.scored = gate.since_start()
        lengths = (result["prompt_mask"].sum(1).tolist(), result["completion_mask"].sum(1).tolist())
        waits.rows = list(zip(*lengths, strict=True))

    gate.timed(trainer, "_generate", "generate")
    gate.timed(trainer, "_generate_and_score_completions", "rollout", ready)
    trainer.train()


def sft(case: Case, gate: Gate) -> None:
    """Supervised fine-tuning on prompts and their completions, each in a row of its own or packed.

    Args:
        case: What is done.
        gate: Where to wait between steps.
    """
    from trl import SFTConfig, SFTTrainer

    waits = Waits(gate, 1)
    # TRL tokenises prompt and completion as one text, so that the completion brings the space between them.
    rows = [{"prompt": row["prompt"], "completion": " " + row["response"]} for row in case.examples()]
    packed = case.row == "sft_packed"
    config = SFTConfig(
        **arguments(case),
        per_device_train_batch_size=workload.PACKED_ROWS if packed else case.rows,
        max_length=case.max_length,
        packing=packed,
        # Packing puts the longest examples first; drawn at random, its steps are alike.
        train_sampling_strategy="random" if packed else "sequential",
        dataset_num_proc=None,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(case.folder),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(case.folder),
        train_dataset=Dataset.from_list(rows),
        callbacks=[waits],
    )

    def learnt(result: Any, model: Any, inputs: dict[str, torch.Tensor], *_: Any) -> None:
        learns = inputs["labels"] != -100
        if packed:  # one row, in which every example begins at position 0
            example = (inputs["position_ids"][0] == 0).cumsum(0) - 1
            responses = torch.bincount(example, learns[0])
            prompts = torch.bincount(example) - responses
        else:
            responses = learns.sum(1)
            prompts = inputs["attention_mask"].sum(1) - responses
        waits.rows = [(int(p), int(r)) for p, r in zip(prompts, responses, strict=True)]

    gate.timed(trainer, "training_step", "training_step", learnt)
    trainer.train()


def reward(case: Case, gate: Gate) -> None:
    """A reward model on pairs.

    Args:
        case: What is done.
        gate: Where to wait between steps.
    """
    from trl import RewardConfig, RewardTrainer

    waits, pairs = Waits(gate, 1), case.pairs()
    prompts = [len(pair["prompt"].split()) for pair in pairs]
    # As of a completion, TRL tokenises what prompt and response are together.
    rows = [{**pair, **{key: f" {pair[key]}" for key in ("chosen", "rejected")}} for pair in pairs]
    config = RewardConfig(
        **arguments(case),
        per_device_train_batch_size=workload.BATCH,
        max_length=case.max_length,
        train_sampling_strategy="sequential",
        dataset_num_proc=None,
    )
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(case.folder, num_labels=1),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(case.folder),
        train_dataset=Dataset.from_list(rows),
        callbacks=[waits],
    )
    read = iter(range(0, len(pairs), workload.BATCH))

    def learnt(result: Any, model: Any, inputs: dict[str, torch.Tensor], *_: Any) -> None:
        start = next(read)
        both = prompts[start : start + workload.BATCH] * 2  # the chosen ones, then the rejected ones
        totals = inputs["attention_mask"].sum(1).tolist()
        waits.rows = [(prompt, total - prompt) for prompt, total in zip(both, totals, strict=True)]

    gate.timed(trainer, "training_step", "training_step", learnt)
    trainer.train()


RUNS = {"ppo": ppo, "grpo": grpo, "grpo_mu": grpo, "sft": sft, "sft_packed": sft, "sft_8k": sft, "reward": reward}
"""How each row is run."""
