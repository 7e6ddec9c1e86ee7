"""What an update costs as the batch grows, while micro-batches stay as they are: time per token, and memory.

For every batch size a process of its own makes iterations of which an epoch is one optimizer step on the whole batch,
in micro-batches. Memory is the most that the process holds during the updates, less what it held once its networks
were set up; gradients and the optimizer's state are in it. Both may be at most 15 % above those of the smallest batch::

    python -m benchmarks.batch_size --size base

The table is written to ``outputs/batch_size/``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from benchmarks import ours, workload
from benchmarks.alternation import ROOT, Result, measure
from benchmarks.machine import forget_peak, memory_now, peak_memory
from benchmarks.tables import command_line, markdown_table
from benchmarks.worker import Gate
from benchmarks.workload import GROUP_SIZE, SIZES, Case

ALLOWED = 1.15
"""How many times the time per token and the memory of the smallest batch those of a larger one may be."""

BATCHES = (8, 16, 32, 64, 128)

HEADINGS = (
    "responses",
    "tokens",
    "update, seconds (min to max)",
    "ms a token",
    "times the smallest",
    "update's peak, GiB",
    "times the smallest",
    "iterations",
)


class MeasuresMemory(ours.WaitsAfterIterations):
    """Waits after every iteration, and knows what its updates added to the memory that the networks take.

    Args:
        gate: At which to wait.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__(gate)
        self.set_up = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Once the networks are there."""
        self.set_up = memory_now()

    def on_experience(self, trainer: L.Trainer, module: L.LightningModule, experience: Any) -> None:
        """Before the updates."""
        super().on_experience(trainer, module, experience)
        forget_peak()

    def known(self, trainer: L.Trainer) -> dict[str, float]:
        """After them."""
        return {**super().known(trainer), "update_gib": peak_memory() - self.set_up}


def online(case: Case, gate: Gate) -> None:
    """Iterations of an online module.

    Args:
        case: What is done.
        gate: Where to wait between them.
    """
    ours.fit(case, ours.module_of(case), MeasuresMemory(gate))


RUNS = {"ppo": online, "grpo": online}
"""How each row is run."""


@dataclass(frozen=True)
class Growth:
    """What the updates of a batch cost.

    Attributes:
        result: What was measured.
    """

    result: Result

    @property
    def per_token(self) -> float:
        """Median milliseconds of an update for each token of its batch, prompts included."""
        pairs = zip(self.result.seconds("optimise"), self.result.iterations, strict=True)
        return 1000 * median(seconds / sum(p + r for p, r in i["rows"]) for seconds, i in pairs)

    @property
    def memory(self) -> float:
        """The most GiB that updates took, beside the networks."""
        return max(self.result.seconds("update_gib"))

    def over(self, smallest: Growth) -> tuple[float, float]:
        """Time per token and memory over those of the smallest batch.

        Args:
            smallest: Cost of that.

        Returns:
            Two ratios.
        """
        return self.per_token / smallest.per_token, self.memory / smallest.memory

    def line(self, smallest: Growth) -> list[str]:
        """A line of the table.

        Args:
            smallest: Cost of the smallest batch.

        Returns:
            A text for each of :data:`HEADINGS`.
        """
        result, seconds = self.result, self.result.seconds("optimise")
        time, memory = self.over(smallest)
        disturbed = f", {result.disturbed} DISTURBED" if result.disturbed else ""
        return [
            str(result.case.batch),
            f"{result.tokens:.0f}",
            f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{self.per_token:.3f}",
            f"{time:.2f}",
            f"{self.memory:.3f}",
            f"{memory:.2f}",
            f"{len(seconds)}{disturbed}",
        ]


def verdict(costs: Sequence[Growth]) -> str:
    """Whether time and memory stay where they should.

    Args:
        costs: Of batches, the smallest first.

    Returns:
        A sentence.
    """
    time, memory = (max(ratios) for ratios in zip(*(cost.over(costs[0]) for cost in costs), strict=True))
    held = "Within" if max(time, memory) <= ALLOWED else "NOT within"
    return (
        f"{held} {100 * (ALLOWED - 1):.0f} % of the smallest batch: at most {time:.2f} times its time per token, and "
        f"{memory:.2f} times its memory."
    )


def parsed(args: list[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        args: Of it.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--row", choices=list(RUNS), default="ppo")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--lengths", choices=["ragged", "full"], default="full", help="of responses")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="N", help="responses")
    parser.add_argument("--micro-batch-size", type=int, default=0, metavar="N", help="responses of a backward pass; 8")
    parser.add_argument("--micro-batch-tokens", type=int, default=0, metavar="N", help="tokens of one instead")
    parser.add_argument("--iterations", type=int, default=3, help="that count, after one of warm-up")
    parser.add_argument("--others", type=float, default=0.25, help="cores that other processes may use meanwhile")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "batch_size", help="folder to write to")
    options = parser.parse_args(args)
    options.batches = sorted(set(options.batches))
    wrong = [n for n in options.batches if n < 1 or n % GROUP_SIZE]
    if wrong:
        parser.error(f"--batches {wrong} must be multiples of {GROUP_SIZE}, the responses to a prompt in a group")
    if options.micro_batch_size and options.micro_batch_tokens:
        parser.error("--micro-batch-size and --micro-batch-tokens say the same: choose one of them")
    if min(options.micro_batch_size, options.micro_batch_tokens) < 0 or options.iterations < 1:
        parser.error("--micro-batch-size, --micro-batch-tokens and --iterations must be at least 1")
    if not options.micro_batch_tokens:
        options.micro_batch_size = options.micro_batch_size or 8
    options.piece = f"{options.micro_batch_tokens} tokens"
    if options.micro_batch_size:
        options.piece = f"{options.micro_batch_size} responses"
    options.command = command_line("benchmarks.batch_size", args)
    return options


def main(args: list[str] | None = None) -> None:
    """Measures, prints and writes.

    Args:
        args: Of the command line.
    """
    options = parsed(args)
    options.output.mkdir(parents=True, exist_ok=True)
    costs: list[Growth] = []
    attempts = 3 * options.iterations
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder), SIZES[options.size], options.lengths)
        for batch in options.batches:
            case = Case(
                options.row,
                options.size,
                options.lengths,
                folder,
                options.threads,
                attempts + 2,
                batch=batch,
                micro_batch_size=options.micro_batch_size,
                micro_batch_tokens=options.micro_batch_tokens,
            )
            pythons = {"ours_memory": Path(sys.executable)}
            (found,) = measure(case, pythons, options.iterations, attempts, options.others, options.output)
            costs.append(Growth(found))
            print(*costs[-1].line(costs[0]), sep=" | ", flush=True)
    lines = [cost.line(costs[0]) for cost in costs]
    facts = [
        f"`{options.command}`",
        f"{options.row} {options.size} {options.lengths}, {options.threads} threads, {options.piece} of a "
        "batch at a time, each epoch one optimizer step.",
        verdict(costs),
    ]
    table = Table(*HEADINGS)
    for line in lines:
        table.add_row(*line)
    Console(width=max(Console().width, 130)).print(table, *facts, sep="\n")
    name = f"{options.row}-{options.size}-{options.lengths}" + ("-tokens" if options.micro_batch_tokens else "")
    (options.output / f"{name}.md").write_text(markdown_table([HEADINGS, *lines], facts))


if __name__ == "__main__":
    main()
