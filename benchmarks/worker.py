"""A process of its own for every system, which makes one iteration when it is told to and sleeps otherwise.

It reads ``go`` from its standard input and answers each iteration with a line of JSON on its standard output; whatever
the system prints goes to standard error. When its standard input is closed, as by the end of whoever told it what to
do, it ends too, in the middle of an iteration if need be.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

import torch

from benchmarks.machine import gpu_peak_memory, peak_memory, wait_for_gpu
from benchmarks.workload import Case

SYSTEMS = {
    "ours": "benchmarks.ours",
    "ours_memory": "benchmarks.batch_size",
    "ours_mkl": "benchmarks.ours",
    "transformers": "benchmarks.transformers_rows",
    "trl": "benchmarks.trl_rows",
}
"""The module that runs each system; its ``RUNS`` say how, row by row."""

_NAMED = ("torch", "transformers", "lightning", "trl", "accelerate")


class Gate:
    """Where a run waits between its iterations.

    Args:
        commands: From which ``go`` is read.
        replies: To which what is known of an iteration is written.
        phases: Seconds of what :meth:`timed` watches, in the present iteration.
    """

    def __init__(self, commands: TextIO, replies: TextIO) -> None:
        self.commands = commands
        self.replies = replies
        self.phases: dict[str, float] = {}
        self.started = time.perf_counter()

    def timed(self, owner: Any, name: str, phase: str, look: Callable[..., None] | None = None) -> None:
        """Replaces a function by one that adds its seconds to a phase.

        Args:
            owner: Module, class or object that has the function.
            name: Of the function.
            phase: That it belongs to.
            look: Is called with what it returned, then with its arguments.
        """
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for_gpu()
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - started
            if look is not None:
                look(result, *args, **kwargs)
            return result

        setattr(owner, name, watched)

    def wait(self, rows: list[tuple[int, int]], **more: float) -> None:
        """Ends an iteration, and begins the next once told to.

        Args:
            rows: Tokens of prompt and response of every row that was read or written in it.
            **more: Seconds of phases that are not watched, and whatever else is to be known of it.

        Raises:
            SystemExit: If there is to be no other.
        """
        seconds = self.since_start()
        reply = {
            "seconds": seconds,
            **self.phases,
            **more,
            "rows": rows,
            "peak": gpu_peak_memory() or peak_memory(),
            "versions": _versions(),
        }
        self.replies.write(json.dumps(reply) + "\n")
        self.replies.flush()
        if self.commands.readline().strip() != "go":
            raise SystemExit(0)
        self.phases.clear()
        self.started = time.perf_counter()

    def since_start(self) -> float:
        """Seconds of the present iteration so far."""
        wait_for_gpu()
        return time.perf_counter() - self.started


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_of(system: str, case: Case) -> Callable[[Case, Gate], None]:
    """What makes a system's iterations, once this process is as the system wants it.

    Args:
        system: A key of :data:`SYSTEMS`.
        case: What is done.

    Returns:
        The function.
    """
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    if system == "ours_mkl":
        torch.backends.mkldnn.enabled = False
    return importlib.import_module(SYSTEMS[system]).RUNS[case.row]


def while_open(commands: int) -> TextIO:
    """Passes on what is read from a file, and ends this process as soon as nobody can write to it any more.

    Args:
        commands: Descriptor of a pipe, from which nothing else may read.

    Returns:
        The same lines.
    """
    lines, passed_on = os.pipe()

    def pass_on() -> None:
        while told := os.read(commands, 4096):  # no lock is held meanwhile, so that Python can also end by itself
            os.write(passed_on, told)
        os._exit(1)

    threading.Thread(target=pass_on, daemon=True).start()
    return os.fdopen(lines)


def main() -> None:
    """Runs the system and the case that the command line names."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    run_of(system, case)(case, Gate(while_open(sys.stdin.fileno()), replies))


if __name__ == "__main__":
    main()
