"""Systems that take turns: one makes an iteration while the others sleep, and a disturbed iteration is made again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import Clock
from benchmarks.useful import PHASES, work
from benchmarks.workload import Case

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Entrant:
    """A system that takes its turn.

    Attributes:
        system: A key of :data:`benchmarks.worker.SYSTEMS`.
        python: The interpreter of its environment.
        case: What it does.
    """

    system: str
    python: Path
    case: Case


class Worker:
    """A system in a process and an interpreter of its own.

    Args:
        entrant: Which, and what it is to do.
        log: To which all that it prints is written.
    """

    def __init__(self, entrant: Entrant, log: Path) -> None:
        self.system, case = entrant.system, entrant.case
        self.log = log
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(case.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [entrant.python, "-m", "benchmarks.worker", self.system, json.dumps(asdict(case))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment,
            )

    def reply(self) -> dict[str, Any]:
        """Waits for an iteration to end.

        Returns:
            What :meth:`benchmarks.worker.Gate.wait` says of it.

        Raises:
            RuntimeError: If the system stopped instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = "\n".join(self.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"`{self.system}` stopped; the end of {self.log}:\n{last}")
        return json.loads(line)

    def iteration(self) -> dict[str, Any]:
        """Lets it make one, and looks at what else the machine does meanwhile.

        Returns:
            What it says, and under ``others`` how many cores all other processes used.
        """
        assert self.process.stdin is not None
        before = Clock.read(self.process.pid)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        reply = self.reply()
        return {**reply, "others": Clock.read(self.process.pid).others_since(before)}

    def stop(self) -> None:
        """Ends it, whatever it is doing."""
        self.process.kill()
        self.process.communicate()


@dataclass
class Result:
    """What a system needed for a row.

    Attributes:
        system: Which.
        case: What it did.
        iterations: Those that count, as the worker and the machine describe them.
        dropped: How many were disturbed and made again.
        disturbed: How many of those that count were disturbed too, because the machine was never quiet.
    """

    system: str
    case: Case
    iterations: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    disturbed: int = 0

    def seconds(self, phase: str = "seconds") -> list[float]:
        """Of every iteration that counts.

        Args:
            phase: Or all of it.

        Returns:
            Seconds; none where the row has no such phase.
        """
        return [iteration[phase] for iteration in self.iterations if phase in iteration]

    @property
    def peak(self) -> float:
        """The most memory, in GiB."""
        return max(iteration["peak"] for iteration in self.iterations)

    @property
    def tokens(self) -> float:
        """Real tokens of an iteration, prompts and responses, at the median."""
        return median(sum(p + r for p, r in iteration["rows"]) for iteration in self.iterations)

    @property
    def tokens_per_second(self) -> float:
        """The same over the seconds of the iteration, at the median."""
        return median(sum(p + r for p, r in i["rows"]) / i["seconds"] for i in self.iterations)

    def without_reward_network(self) -> float | None:
        """Median seconds less those of a network that scores; None where there is none."""
        scoring = self.seconds("reward_model")
        if not scoring:
            return None
        return median(whole - reward for whole, reward in zip(self.seconds(), scoring, strict=True))

    @property
    def response_length(self) -> float:
        """Mean tokens of a response."""
        lengths = [response for iteration in self.iterations for _, response in iteration["rows"]]
        return sum(lengths) / len(lengths)

    def gflop(self, phase: str | None = None) -> list[float]:
        """Useful work of every iteration that counts.

        Args:
            phase: Or all of it.

        Returns:
            GFLOP.
        """
        parts = [work(self.case, self.system, iteration["rows"]) for iteration in self.iterations]
        return [sum(part.values()) if phase is None else part[phase] for part in parts]

    def share(self, matrix_rate: float, phase: str | None = None) -> float | None:
        """Useful work a second over what the machine's matrix products reach.

        Args:
            matrix_rate: In GFLOP a second.
            phase: Or all of it.

        Returns:
            The median share; None where the phase took no time that is known.
        """
        seconds = self.seconds("seconds" if phase is None else phase)
        if not seconds:
            return None
        return median(f / s for f, s in zip(self.gflop(phase), seconds, strict=True)) / matrix_rate

    def summary(self, matrix_rate: float) -> dict[str, Any]:
        """All of it in plain values.

        Args:
            matrix_rate: In GFLOP a second.

        Returns:
            For JSON.
        """
        phases = [phase for phase in (*PHASES, "reward_model") if self.seconds(phase)]
        shares = {phase: self.share(matrix_rate, phase) for phase in PHASES if phase in phases}
        return {
            "system": self.system,
            "case": {**asdict(self.case), "folder": None},
            "seconds": {"median": median(self.seconds()), "min": min(self.seconds()), "max": max(self.seconds())},
            "phases": {phase: median(self.seconds(phase)) for phase in phases},
            "share_of_matrix_rate": {"whole": self.share(matrix_rate), **shares},
            "gflop": median(self.gflop()),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "response_length": self.response_length,
            "peak_gib": self.peak,
            "dropped": self.dropped,
            "disturbed": self.disturbed,
            "versions": self.iterations[0]["versions"],
            "iterations": [{k: v for k, v in i.items() if k not in ("rows", "versions")} for i in self.iterations],
        }


def measure(entrants: Sequence[Entrant], count: int, attempts: int, others_allowed: float, logs: Path) -> list[Result]:
    """Lets systems work in turns.

    Every system makes one iteration of warm-up, which ends its building and does not count. Then each round is one
    iteration of every system that still needs some.

    Args:
        entrants: The systems, and what each does.
        count: Iterations that are to count.
        attempts: Iterations at most: if the machine is never quiet, the least disturbed ones count.
        others_allowed: Cores that other processes may use during an iteration that counts.
        logs: Folder for what the systems print.

    Returns:
        A result for every system, in order.
    """
    workers: list[Worker] = []
    made: list[list[dict[str, Any]]] = []
    try:
        for number, entrant in enumerate(entrants):
            workers.append(Worker(entrant, logs / f"{entrant.case.row}-{number}-{entrant.system}.log"))
            workers[-1].reply()
            made.append([])
        for _ in range(attempts):
            for worker, iterations in zip(workers, made, strict=True):
                if sum(i["others"] <= others_allowed for i in iterations) < count:
                    iterations.append(worker.iteration())
    finally:
        for worker in workers:
            worker.stop()
    return [
        chosen(Result(entrant.system, entrant.case), iterations, count, others_allowed)
        for entrant, iterations in zip(entrants, made, strict=True)
    ]


def chosen(result: Result, iterations: Sequence[dict[str, Any]], count: int, others_allowed: float) -> Result:
    """Picks the iterations that count: the quiet ones, and if there are too few the least disturbed of the others.

    Args:
        result: To be filled.
        iterations: All that were made.
        count: How many are to count.
        others_allowed: Cores that other processes may use during a quiet one.

    Returns:
        The result.
    """
    quiet = [i for i in iterations if i["others"] <= others_allowed]
    loud = sorted((i for i in iterations if i["others"] > others_allowed), key=lambda i: i["others"])
    result.disturbed = min(len(loud), max(0, count - len(quiet)))
    result.iterations = quiet[:count] + loud[: result.disturbed]
    result.dropped = len(loud) - result.disturbed
    return result
