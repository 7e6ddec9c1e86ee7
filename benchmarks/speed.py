"""Seconds and memory of this library beside TRL or transformers, on the same work, in turns.

Each row is one or several of ``ppo grpo grpo_mu sft generate``, such as::

    python -m benchmarks.speed ppo --size base --lengths ragged
    python -m benchmarks.speed ppo --size base --unfrozen 2

TRL is measured where ``python -m benchmarks.environments`` has put it. An iteration during which other processes used
more than a quarter of a core is made again. What comes out is printed, and written to ``outputs/speed/`` as JSON and
as a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import environments, workload
from benchmarks.alternation import ROOT, Result, measure
from benchmarks.machine import matrix_rate
from benchmarks.useful import PHASES
from benchmarks.workload import SIZES, Case

PEERS = {"ppo": "trl", "grpo": "trl", "grpo_mu": "trl", "sft": "trl", "generate": "transformers"}
"""The rows, and beside whom each is measured."""

HEADINGS = (
    "row",
    "system",
    "seconds (min to max)",
    *PHASES,
    "times as fast",
    "response tokens",
    "tokens/s",
    "of matrix rate",
    "peak GiB",
    "iterations",
)


def pythons_of(row: str, systems: Sequence[str]) -> dict[str, Path]:
    """Who can run a row here.

    Args:
        row: Such as ``"ppo"``.
        systems: Who is asked for; both where it is empty.

    Returns:
        Systems, and the interpreter of each.
    """
    peer = environments.python_of(row) if PEERS[row] == "trl" else Path(sys.executable)
    found = {"ours": Path(sys.executable), PEERS[row]: peer}
    return {name: python for name, python in found.items() if python is not None and (not systems or name in systems)}


def cells(result: Result, rate: float, baseline: float) -> list[str]:
    """A line of the table.

    Args:
        result: Of a system.
        rate: Of matrix products, in GFLOP a second.
        baseline: Median seconds of the system that it is compared with, the last one of its row.

    Returns:
        A text for each of :data:`HEADINGS`.
    """
    case, seconds = result.case, result.seconds()
    trains = "" if case.num_layers_unfrozen == -1 or result.system != "ours" else f", top {case.num_layers_unfrozen}"
    phases = [f"{median(result.seconds(phase)):.2f}" if result.seconds(phase) else "" for phase in PHASES]
    dropped = f", {result.dropped} dropped" if result.dropped else ""
    return [
        f"{case.row} {case.size} {case.lengths}{trains}",
        result.system,
        f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        *phases,
        f"{baseline / median(seconds):.2f}",
        f"{result.response_length:.0f}",
        f"{result.tokens / median(seconds):.0f}",
        f"{100 * (result.share(rate) or 0.0):.0f} %",
        f"{result.peak:.2f}",
        f"{len(seconds)}{dropped}" + (f", {result.disturbed} DISTURBED" if result.disturbed else ""),
    ]


def lines_of(results: Sequence[Result], rate: float) -> list[list[str]]:
    """The lines of one row: every system, and TRL's PPO once more without the time of its reward network.

    Args:
        results: Of all systems, ours first.
        rate: Of matrix products, in GFLOP a second.

    Returns:
        Cells, line by line.
    """
    baseline = median(results[-1].seconds())
    lines = [cells(result, rate, baseline) for result in results]
    for result in results:
        if result.seconds("reward_model"):
            pairs = zip(result.seconds(), result.seconds("reward_model"), strict=True)
            without = median(whole - reward for whole, reward in pairs)
            line = [""] * len(HEADINGS)
            line[1:3] = f"{result.system}, no reward network", f"{without:.2f}"
            line[HEADINGS.index("times as fast")] = f"{baseline / without:.2f}"
            lines.append(line)
    return lines


def markdown_table(lines: Sequence[Sequence[str]], facts: Sequence[str]) -> str:
    """A table for a page of text.

    Args:
        lines: Cells, line by line; the first are headings.
        facts: Sentences to go below it.

    Returns:
        The text.
    """
    heading, *rest = lines
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *rest]] + ["", *facts, ""]
    )


def facts_of(results: Sequence[Result], rate: float, threads: int) -> list[str]:
    """What must be known to read the table.

    Args:
        results: All of them.
        rate: Of matrix products, in GFLOP a second.
        threads: Of torch.

    Returns:
        Sentences.
    """
    versions = {system: r.iterations[0]["versions"] for r in results for system in [f"{r.system} ({r.case.row})"]}
    facts = [f"{threads} threads; a product of two 2048 x 2048 matrices in single precision: {rate:.0f} GFLOP/s."]
    by_text: dict[str, list[str]] = {}
    for system, found in versions.items():
        by_text.setdefault(", ".join(f"{name} {number}" for name, number in found.items()), []).append(system)
    facts += [f"{', '.join(systems)}: {text}." for text, systems in by_text.items()]
    if any(r.disturbed for r in results):
        facts.append("DISTURBED: other processes used the machine; only ratios, and only roughly, mean anything.")
    return facts


def parsed(args: list[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        args: Of it.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", choices=list(PEERS), metavar="row", help=" ".join(PEERS))
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--lengths", choices=["ragged", "full"], default="full", help="of responses")
    parser.add_argument("--unfrozen", type=int, default=-1, metavar="N", help="ours trains the top N blocks only")
    parser.add_argument("--iterations", type=int, default=5, help="that count, after one of warm-up")
    parser.add_argument("--attempts", type=int, help="iterations at most; three times those that count by default")
    parser.add_argument("--others", type=float, default=0.25, help="cores that other processes may use meanwhile")
    parser.add_argument("--systems", nargs="+", default=[], choices=["ours", "trl", "transformers"], help="only these")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "speed", help="folder to write to")
    options = parser.parse_args(args)
    options.attempts = options.attempts or 3 * options.iterations
    if not 1 <= options.iterations <= options.attempts:
        parser.error(f"--iterations {options.iterations} must be at least 1, and at most --attempts {options.attempts}")
    if options.unfrozen != -1 and set(options.rows) & {"sft", "generate"}:
        parser.error(f"--unfrozen {options.unfrozen} goes with ppo, grpo and grpo_mu")
    return options


def main(args: list[str] | None = None) -> None:
    """Measures, prints and writes.

    Args:
        args: Of the command line.
    """
    options = parsed(args)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    rate = matrix_rate(options.threads)
    done: list[list[Result]] = []
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder), SIZES[options.size], options.lengths)
        for row in options.rows:
            pythons = pythons_of(row, options.systems)
            if PEERS[row] not in pythons and PEERS[row] in (options.systems or [PEERS[row]]):
                console.print(f"{row}: no {PEERS[row]} here; `python -m benchmarks.environments` installs it")
            if not pythons:
                continue
            case = Case(
                row, options.size, options.lengths, folder, options.threads, options.attempts + 2, options.unfrozen
            )
            done.append(measure(case, pythons, options.iterations, options.attempts, options.others, options.output))
            rate = max(rate, matrix_rate(options.threads))
    if done:
        report(done, rate, options, console)


def report(done: Sequence[Sequence[Result]], rate: float, options: argparse.Namespace, console: Console) -> None:
    """Prints the table, and writes it beside all that was measured.

    Args:
        done: Results, row by row.
        rate: Of matrix products, in GFLOP a second.
        options: Of the command line.
        console: To print to.
    """
    lines = [line for results in done for line in lines_of(results, rate)]
    facts = facts_of([result for results in done for result in results], rate, options.threads)
    table = Table(*HEADINGS)
    for line in lines:
        table.add_row(*line)
    Console(width=max(console.width, 170)).print(table, *facts, sep="\n")

    name = "-".join([*options.rows, options.size, options.lengths])
    name += "" if options.unfrozen == -1 else f"-top{options.unfrozen}"
    everything: dict[str, Any] = {
        "matrix_rate_gflops": rate,
        "threads": options.threads,
        "results": [result.summary(rate) for results in done for result in results],
    }
    (options.output / f"{name}.json").write_text(json.dumps(everything, indent=1))
    (options.output / f"{name}.md").write_text(markdown_table([HEADINGS, *lines], facts))
    console.print(f"written to {options.output / name}.json and .md")


if __name__ == "__main__":
    main()
