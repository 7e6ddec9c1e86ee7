"""Seconds and memory of this library beside TRL or transformers, on the same work, in turns.

Each row is one or several of ``ppo grpo grpo_mu sft sft_packed reward generate sft_8k grpo_16k``, such as::

    python -m benchmarks.speed ppo --size base --lengths ragged
    python -m benchmarks.speed ppo --size base --unfrozen -1 2
    python -m benchmarks.speed sft --size base --kernel onednn mkl
    python -m benchmarks.speed generate ppo sft_8k grpo_16k --size qwen3-0.6b --compile off on

The last one is for a GPU. ``sft_8k`` and ``grpo_16k`` train on texts of so many thousand tokens; ``grpo_16k`` does so
beside nobody, and on responses that it is given: writing them is not part of it.

TRL is measured where ``python -m benchmarks.environments`` has put it. An iteration during which other processes used
more than a quarter of a core is made again. What comes out is printed, and written to ``outputs/speed/`` as JSON and
as a table in Markdown.

Systems do the same work and are compared by their seconds, but for ``sft_packed``, where each packs in its own way and
real tokens a second count.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import environments, workload
from benchmarks.alternation import Entrant, Result, measure
from benchmarks.machine import MatrixRate, best, better, gpu_rates, matrix_rates
from benchmarks.options import add_iterations, options_of, parser_of
from benchmarks.sizes import SIZES
from benchmarks.tables import HEADINGS, facts_of, lines_of, publish, times_as_fast
from benchmarks.workload import LONG, Case

PEERS = {
    "ppo": "trl",
    "grpo": "trl",
    "grpo_mu": "trl",
    "sft": "trl",
    "sft_packed": "trl",
    "reward": "trl",
    "generate": "transformers",
    "sft_8k": "trl",
    "grpo_16k": "ours",
}
"""The rows, and beside whom each is measured."""

KERNELS = {"onednn": "ours", "mkl": "ours_mkl"}
"""Whose matrix products this library is measured with, and the name of the system that it then is."""


def pythons_of(row: str, systems: Sequence[str], kernels: Sequence[str] = ("onednn",)) -> dict[str, Path]:
    """Who can run a row here.

    Args:
        row: Such as ``"ppo"``.
        systems: Who is asked for; both where it is empty.
        kernels: Keys of :data:`KERNELS`.

    Returns:
        Systems, and the interpreter of each.
    """
    peer = environments.python_of(row) if PEERS[row] == "trl" else Path(sys.executable)
    systems = ["ours"] if PEERS[row] == "ours" else systems
    wanted = systems or ["ours", PEERS[row]]
    found: dict[str, Path | None] = {}
    if "ours" in wanted:
        found = {KERNELS[kernel]: Path(sys.executable) for kernel in kernels}
    if PEERS[row] in wanted and PEERS[row] != "ours":
        found[PEERS[row]] = peer
    return {name: python for name, python in found.items() if python is not None}


def entrants_of(
    case: Case, pythons: Mapping[str, Path], unfrozen: Sequence[int], compiles: Sequence[str] = ("off",)
) -> list[Entrant]:
    """Who takes turns.

    Args:
        case: What is done.
        pythons: Systems, and the interpreter of each.
        unfrozen: How many of the top blocks this library trains, one after the other; -1 for all.
        compiles: Whether it compiles what trains: ``"off"``, ``"on"`` or both.

    Returns:
        This library once for each of them, then the others.
    """
    return [
        Entrant(system, python, replace(case, num_layers_unfrozen=top, compiles=compiled == "on"))
        for system, python in pythons.items()
        for top in (unfrozen if system in KERNELS.values() else [-1])
        for compiled in (compiles if system in KERNELS.values() and case.row != "generate" else ["off"])
    ]


def parsed(args: list[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        args: Of it.

    Returns:
        The options; what comes out is written under ``name``.
    """
    parser = parser_of("speed", __doc__)
    add_iterations(parser, 5)
    parser.add_argument("rows", nargs="+", choices=list(PEERS), metavar="row", help=" ".join(PEERS))
    parser.add_argument(
        "--unfrozen", nargs="+", type=int, default=[-1], metavar="N", help="ours trains the top N blocks only; -1: all"
    )
    parser.add_argument("--systems", nargs="+", default=[], choices=["ours", "trl", "transformers"], help="only these")
    parser.add_argument("--kernel", nargs="+", default=["onednn"], choices=list(KERNELS), help="of our products")
    parser.add_argument("--compile", nargs="+", default=["off"], choices=["off", "on"], help="what ours trains by")
    options = options_of(parser, args)
    if set(options.rows) & set(LONG) and not SIZES[options.size].on_gpu:
        parser.error(f"{' '.join(LONG)} go with a size for GPUs, as --size qwen3-0.6b")
    if options.unfrozen != [-1] and set(options.rows) & {"sft", "sft_packed", "sft_8k", "reward", "generate"}:
        parser.error(f"--unfrozen {shlex.join(map(str, options.unfrozen))} goes with ppo, grpo and grpo_mu")
    options.name = "-".join([*options.rows, options.size, options.lengths])
    options.name += "".join(
        "-all" if top == -1 else f"-top{top}" for top in options.unfrozen if options.unfrozen != [-1]
    )
    options.name += "-compiled" if "on" in options.compile else ""
    options.name += "" if options.kernel == ["onednn"] else f"-{'-'.join(options.kernel)}"
    return options


def main(args: list[str] | None = None) -> None:
    """Measures, prints and writes.

    Args:
        args: Of the command line.
    """
    options = parsed(args)
    options.output.mkdir(parents=True, exist_ok=True)
    size = SIZES[options.size]
    rates = gpu_rates() if size.on_gpu else matrix_rates(options.threads)
    done: list[list[Result]] = []
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder), size, options.lengths)
        for row in options.rows:
            pythons = pythons_of(row, options.systems, options.kernel)
            if PEERS[row] not in pythons and PEERS[row] in (options.systems or [PEERS[row]]):
                print(f"{row}: no {PEERS[row]} here; `python -m benchmarks.environments` installs it")
            if not pythons:
                continue
            case = Case(row, options.size, options.lengths, folder, options.threads, options.attempts + 2)
            entrants = entrants_of(case, pythons, options.unfrozen, options.compile)
            done.append(measure(entrants, options.iterations, options.attempts, options.others, options.output))
            rates = better(rates, gpu_rates() if size.on_gpu else matrix_rates(options.threads))
    if done:
        report(done, rates, options)


def report(done: Sequence[Sequence[Result]], rates: Mapping[str, MatrixRate], options: argparse.Namespace) -> None:
    """Prints the table, and writes it beside all that was measured.

    Args:
        done: Results, row by row.
        rates: Of matrix products.
        options: Of the command line.
    """
    rate = best(rates)
    lines = [line for results in done for line in lines_of(results, rate)]
    facts = facts_of(done, rates, options.threads, options.command)
    publish([HEADINGS, *lines], facts, options.output / f"{options.name}.md")
    everything: dict[str, Any] = {
        "command": options.command,
        "matrix_rate_gflops": {backend: asdict(found) for backend, found in rates.items()},
        "threads": options.threads,
        "results": [
            {**result.summary(rate), "times_as_fast": times_as_fast(result, results[-1])}
            for results in done
            for result in results
        ],
    }
    (options.output / f"{options.name}.json").write_text(json.dumps(everything, indent=1))
    print(f"written to {options.output / options.name}.json and .md")


if __name__ == "__main__":
    main()
