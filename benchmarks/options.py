"""What the command lines of several benchmarks share."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.alternation import ROOT
from benchmarks.sizes import SIZES


def parser_of(program: str, about: str | None) -> argparse.ArgumentParser:
    """A command line with the options of every benchmark that does the work of :mod:`benchmarks.workload`.

    Args:
        program: Such as ``"speed"``; ``outputs/`` has a folder of that name.
        about: Docstring of its module.

    Returns:
        A parser, to which a benchmark adds options of its own.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--lengths", choices=["ragged", "full"], default="full", help="of responses")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / program, help="folder to write to")
    return parser


def add_iterations(parser: argparse.ArgumentParser, count: int) -> None:
    """Options of a benchmark whose iterations are timed by :func:`benchmarks.alternation.measure`.

    Args:
        parser: Of :func:`parser_of`.
        count: Iterations that count where nothing else is said.
    """
    parser.add_argument("--iterations", type=int, default=count, help="that count, after one of warm-up")
    parser.add_argument("--attempts", type=int, help="iterations at most; three times those that count by default")
    parser.add_argument("--others", type=float, default=0.25, help="cores that other processes may use meanwhile")


def options_of(parser: argparse.ArgumentParser, args: Sequence[str] | None, fewest: int = 1) -> argparse.Namespace:
    """Reads a command line.

    Args:
        parser: Of :func:`parser_of`.
        args: Of it; None takes those of this process.
        fewest: Iterations that may be asked for.

    Returns:
        The options; under ``command`` what somebody has to type to get the same.
    """
    args = sys.argv[1:] if args is None else args
    options = parser.parse_args(args)
    options.command = f"{parser.prog} {shlex.join(args)}".strip()
    if "iterations" in options:
        if options.attempts is None:
            options.attempts = 3 * options.iterations
        count, most = options.iterations, options.attempts
        if not fewest <= count <= most:
            parser.error(f"--iterations {count} must be at least {fewest}, and at most --attempts {most}")
    return options
