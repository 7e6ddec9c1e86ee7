"""Peak memory of two processes while a network is built and dealt out to them, or built whole by each.

A network of 124 million weights (496 MB in single precision, the shape of GPT-2) lies in a folder. Two processes on
this machine, joined by gloo, make it ready to train, by ``rlhf_fsdp2`` and by ``ddp``, and end before the first batch::

    python -m benchmarks.dealing

Measured is the resident set of each, at its highest and afterwards, less what it was when everything had been imported.
The table is written to ``outputs/dealing/``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import workload
from benchmarks.alternation import ROOT
from benchmarks.machine import forget_peak, memory_now, peak_memory
from benchmarks.memory import SIZE
from benchmarks.ours import quiet
from benchmarks.tables import publish

STRATEGIES = ("rlhf_fsdp2", "ddp")
HEADINGS = ("strategy", "process", "at most, GiB", "afterwards, GiB")
PROCESSES = 2


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward that is not asked.

    Args:
        prompts: Not looked at.
        responses: Not looked at.

    Returns:
        A number each.
    """
    return [0.0] * len(responses)


def measured(strategy: str, folder: Path) -> dict[str, float]:
    """Makes a network ready to train, as one of several processes.

    Args:
        strategy: Of the Trainer.
        folder: Of the network.

    Returns:
        The most memory that it took, and what is left of that, in GiB.
    """
    for name in ("peft", "transformers.models.gpt2.modeling_gpt2", "torch.distributed.fsdp"):
        importlib.import_module(name)
    import lightning as L

    from lightning_rlhf import PPOModule, PromptDataModule

    quiet()
    module = PPOModule(str(folder), reward=score, kl_coef=0.0, sampling={"max_new_tokens": 8})
    data = PromptDataModule(["w1"] * PROCESSES, batch_size=1)
    nothing = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=PROCESSES,
        max_epochs=1,
        limit_train_batches=0,
        enable_model_summary=False,
        **nothing,
    )
    before = memory_now()
    forget_peak()
    trainer.fit(module, datamodule=data)
    highest = peak_memory()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"highest": highest - before, "afterwards": memory_now() - before}


def in_processes(strategy: str, folder: Path) -> list[dict[str, float]]:
    """Measures in processes of their own.

    Args:
        strategy: Of the Trainer.
        folder: Of the network.

    Returns:
        As :func:`measured`, of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES), "NODE_RANK": "0"}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "benchmarks.dealing", strategy, "--run", str(folder)]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(PROCESSES)
    ]
    results = []
    for process in running:
        printed, complained = process.communicate()
        if process.returncode:
            for other in running:
                other.kill()
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{complained[-4000:]}")
        results.append(json.loads(printed.splitlines()[-1]))
    return results


def lines_of(strategy: str, results: Sequence[dict[str, float]]) -> list[list[str]]:
    """Lines of the table.

    Args:
        strategy: Of the Trainer.
        results: Of :func:`in_processes`.

    Returns:
        A text for each of :data:`HEADINGS`, process by process.
    """
    return [
        [strategy, str(rank), f"{result['highest']:.2f}", f"{result['afterwards']:.2f}"]
        for rank, result in enumerate(results)
    ]


def main(args: list[str] | None = None) -> None:
    """Measures, prints and writes.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dealing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("strategies", nargs="*", default=STRATEGIES, metavar="strategy", help=" ".join(STRATEGIES))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "dealing", help="folder to write to")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if unknown := set(options.strategies) - set(STRATEGIES):
        parser.error(f"strategies {sorted(unknown)} must be of {', '.join(STRATEGIES)}")
    if options.run is not None:
        print(json.dumps(measured(options.strategies[0], options.run)))
        return
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder), SIZE, "full")
        for strategy in options.strategies:
            lines += lines_of(strategy, in_processes(strategy, Path(folder)))
    for line in lines:
        print(*line, sep=" | ")
    facts = [f"A GPT-2 of 124 M weights in single precision and a value head, {PROCESSES} processes, no reference."]
    publish([HEADINGS, *lines], facts, options.output / "gpt2.md")


if __name__ == "__main__":
    main()
