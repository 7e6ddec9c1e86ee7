"""What an update costs as the batch grows, while micro-batches stay as they are: time per token, and memory.

For every batch size a process of its own makes iterations of which an epoch is one optimizer step on the whole batch,
in micro-batches. Memory is the most that the process holds during the updates, less what it held once its networks
were set up; gradients and the optimizer's state are in it. Both may be at most 15 % above those of the smallest batch::

    python -m benchmarks.batch_size --size base

The table is written to ``outputs/batch_size/``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

from benchmarks import ours, workload
from benchmarks.alternation import Entrant, Result, measure
from benchmarks.machine import forget_peak, memory_now, peak_memory
from benchmarks.options import add_iterations, options_of, parser_of
from benchmarks.sizes import SIZES
from benchmarks.tables import iterations, publish, spread
from benchmarks.worker import Gate
from benchmarks.workload import GROUP_SIZE, Case

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
        return max(iteration["update_gib"] for iteration in self.result.iterations)

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
        result = self.result
        time, memory = self.over(smallest)
        return [
            str(result.case.batch),
            f"{result.tokens:.0f}",
            spread(result.seconds("optimise")),
            f"{self.per_token:.3f}",
            f"{time:.2f}",
            f"{self.memory:.3f}",
            f"{memory:.2f}",
            iterations(result),
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
        The options; what comes out is written under ``name``.
    """
    parser = parser_of("batch_size", __doc__)
    add_iterations(parser, 3)
    parser.add_argument("--row", choices=list(RUNS), default="ppo")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="N", help="responses")
    piece = parser.add_mutually_exclusive_group()
    piece.add_argument("--micro-batch-size", type=int, metavar="N", help="responses of a backward pass; 8 by default")
    piece.add_argument("--micro-batch-tokens", type=int, metavar="N", help="tokens of one instead")
    options = options_of(parser, args)
    options.batches = sorted(set(options.batches))
    wrong = [n for n in options.batches if n < 1 or n % GROUP_SIZE]
    if wrong:
        parser.error(f"--batches {wrong} must be multiples of {GROUP_SIZE}, the responses to a prompt in a group")
    for name in ("micro_batch_size", "micro_batch_tokens"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name.replace('_', '-')} {given} must be at least 1")
    if options.micro_batch_tokens is None and options.micro_batch_size is None:
        options.micro_batch_size = 8
    options.name = f"{options.row}-{options.size}-{options.lengths}" + ("-tokens" if options.micro_batch_tokens else "")
    return options


def main(args: list[str] | None = None) -> None:
    """Measures, prints and writes.

    Args:
        args: Of the command line.
    """
    options = parsed(args)
    options.output.mkdir(parents=True, exist_ok=True)
    costs: list[Growth] = []
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder), SIZES[options.size], options.lengths)
        for batch in options.batches:
            case = Case(
                options.row,
                options.size,
                options.lengths,
                folder,
                options.threads,
                options.attempts + 2,
                batch=batch,
                micro_batch_size=options.micro_batch_size or 0,
                micro_batch_tokens=options.micro_batch_tokens or 0,
            )
            entrants = [Entrant("ours_memory", Path(sys.executable), case)]
            (found,) = measure(entrants, options.iterations, options.attempts, options.others, options.output)
            costs.append(Growth(found))
            print(*costs[-1].line(costs[0]), sep=" | ", flush=True)
    tokens = options.micro_batch_tokens
    piece = f"{tokens} tokens" if tokens else f"{options.micro_batch_size} responses"
    facts = [
        f"`{options.command}`",
        f"{options.row} {options.size} {options.lengths}, {options.threads} threads, {piece} of a batch "
        "at a time, each epoch one optimizer step.",
        verdict(costs),
    ]
    publish([HEADINGS, *(cost.line(costs[0]) for cost in costs)], facts, options.output / f"{options.name}.md")


if __name__ == "__main__":
    main()
