"""Peak memory of ways to train one network by PPO, each in a process of its own, beside what ``plan`` says of it.

A network of 124 million weights (496 MB in single precision, the shape of GPT-2) with random weights makes two
iterations: full, with the top two blocks unfrozen, by LoRA, by LoRA on a base in four bits, and full with 8-bit Adam::

    python -m benchmarks.memory

Measured is the resident set at its highest, less what it was when everything had been imported, in two processes: one
with the C library's allocator as it is, and one in which it returns freed memory at once (``MALLOC_MMAP_THRESHOLD_``).
The difference is memory that nothing uses: glibc keeps it in pieces in which the next tensor finds no room. All prompts
and responses are of full length, as a plan takes them to be. A base in four bits is read from a file in single
precision, whose pages count as resident until the system wants them back; a plan is of what tensors take. The table is
written to ``outputs/memory/``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import texts, workload
from benchmarks.alternation import ROOT
from benchmarks.machine import forget_peak, memory_now, peak_memory
from benchmarks.ours import quiet
from benchmarks.sizes import Size
from benchmarks.tables import publish

SIZE = Size(768, 12, 12, 50257)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, MICRO_BATCH = 8, 64, 32, 4
CONFIG = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "bos_token_id", "eos_token_id", "pad_token_id")
CONFIG += ("attn_pdrop", "embd_pdrop", "resid_pdrop")
"""What of the network's config is not transformers' own."""
RETURNS = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Lets glibc map what is this large by itself, so that it goes back to the system as soon as it is freed."""
HEADINGS = ("trained", "weights that train", "planned, GiB", "measured, GiB", "planned / measured")
HEADINGS += ("freed memory returned, GiB", "planned / returned")

LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
EIGHT_BITS = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-6}}
ROWS: dict[str, dict[str, Any]] = {
    "full": {},
    "hydra": {"policy": {"num_layers_unfrozen": 2}},
    "lora": {"policy": {"adapter": LORA}},
    "qlora": {"policy": {"adapter": LORA, "quantization": "nf4"}},
    "adam8bit": {"optimizer": EIGHT_BITS},
}
"""What a way has beside what all have, as in a configuration."""


def tokenizer() -> Any:
    """Of the network."""
    return workload.tokenizer(SIZE)


def score(prompts: Sequence[str], responses: Sequence[str], response_tokens: Sequence[Any]) -> list[float]:
    """The toy reward of the other benchmarks.

    Args:
        prompts: Not looked at.
        responses: Not looked at.
        response_tokens: What was written.

    Returns:
        A number from 0 to 1 each.
    """
    return workload.reward([row.tolist() for row in response_tokens], SIZE)


def configuration(row: str, folder: Path, size: Size = SIZE) -> dict[str, Any]:
    """A run as the command line reads it.

    Args:
        row: A key of :data:`ROWS`.
        folder: Of the network, for ways that can only read one; others draw its weights.
        size: Of the network.

    Returns:
        The configuration.
    """
    more = {**ROWS[row]}
    network = {"class_path": "transformers.GPT2Config", "init_args": _arguments(size)}
    policy = {"model": network, **more.pop("policy", {})}
    if "quantization" in policy:
        policy["model"] = str(folder)
    prompts = [" ".join(f"w{texts.WORDS + (7 * i + j) % 97}" for j in range(PROMPT_TOKENS)) for i in range(2 * PROMPTS)]
    quiet_trainer = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "enable_model_summary": False,
            **quiet_trainer,
        },
        "model": {
            "class_path": "PPOModule",
            "init_args": {
                "policy": policy,
                "tokenizer": {"class_path": "benchmarks.memory.tokenizer"},
                "reward": "benchmarks.memory.score",
                "sampling": {"max_new_tokens": NEW_TOKENS},
                "kl_coef": workload.KL_COEF,
                "num_epochs": 1,
                "minibatch_size": PROMPTS,
                "micro_batch_size": MICRO_BATCH,
                **more,
            },
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"prompts": prompts, "batch_size": PROMPTS}},
    }


def _arguments(size: Size) -> dict[str, Any]:
    """Of the config, as a configuration writes them."""
    config = workload.config(size)
    return {name: getattr(config, name) for name in CONFIG}


def measured(path: Path) -> dict[str, float]:
    """Makes a run in this process.

    Args:
        path: Of its configuration.

    Returns:
        The most memory that it took, in GiB, and how many weights trained.
    """
    for name in ("bitsandbytes", "peft", "transformers.models.gpt2.modeling_gpt2", "lightning_rlhf.cli"):
        importlib.import_module(name)
    from lightning_rlhf.cli import RLHFCLI

    quiet()
    before = memory_now()
    forget_peak()
    cli = RLHFCLI(["fit", "--config", str(path)])
    trained = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    return {"gib": peak_memory() - before, "trained": trained}


def in_a_process(path: Path, more: Mapping[str, str]) -> dict[str, float]:
    """Makes a run in a process of its own.

    Args:
        path: Of its configuration.
        more: Environment variables.

    Returns:
        As :func:`measured`.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    command = [sys.executable, "-m", "benchmarks.memory", "--run", str(path)]
    # In a folder of its own, since `fit` leaves its configuration where it runs.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def planned(path: Path) -> float:
    """What a plan says of a run.

    Args:
        path: Of its configuration.

    Returns:
        The most memory, in GiB.
    """
    from lightning_rlhf.cli import RLHFCLI

    return float(RLHFCLI(["plan", "--config", str(path), "--prompt_tokens", str(PROMPT_TOKENS)]).plan.total / 2**30)


def line_of(row: str, found: Mapping[str, float], returned: Mapping[str, float], plan: float) -> list[str]:
    """A line of the table.

    Args:
        row: A key of :data:`ROWS`.
        found: Of :func:`measured`.
        returned: The same where freed memory is returned.
        plan: Of :func:`planned`.

    Returns:
        A text for each of :data:`HEADINGS`.
    """
    peaks = [text for peak in (found["gib"], returned["gib"]) for text in (f"{peak:.2f}", f"{plan / peak:.2f}")]
    return [row, f"{found['trained'] / 1e6:.1f} M", f"{plan:.2f}", *peaks]


def parsed(args: list[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        args: Of it.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row", default=list(ROWS), help=" ".join(ROWS))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "memory", help="folder to write to")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"rows {sorted(unknown)} must be of {', '.join(ROWS)}")
    options.command = " ".join(["python -m benchmarks.memory", *(args or [])]).strip()
    options.name = "gpt2"
    return options


def main(args: list[str] | None = None) -> None:
    """Measures, prints and writes.

    Args:
        args: Of the command line.
    """
    options = parsed(sys.argv[1:] if args is None else args)
    if options.run is not None:
        print(json.dumps(measured(options.run)))
        return
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        if any("quantization" in ROWS[row].get("policy", {}) for row in options.rows):
            workload.save(Path(folder), SIZE, "full")
        for row in options.rows:
            path = Path(folder) / f"{row}.yaml"
            path.write_text(yaml.safe_dump(configuration(row, Path(folder))))
            found, returned = in_a_process(path, {}), in_a_process(path, RETURNS)
            lines.append(line_of(row, found, returned, planned(path)))
            print(*lines[-1], sep=" | ", flush=True)
    facts = [
        f"`{options.command}`",
        f"PPO on a GPT-2 of 124 M weights in single precision, 1 thread; {PROMPTS} prompts of {PROMPT_TOKENS} tokens, "
        f"responses of {NEW_TOKENS}, {MICRO_BATCH} rows at a time, two iterations.",
        f"Freed memory is returned under `{' '.join(f'{name}={value}' for name, value in RETURNS.items())}`.",
    ]
    publish([HEADINGS, *lines], facts, options.output / f"{options.name}.md")


if __name__ == "__main__":
    main()
