"""Where the time of one iteration of this library goes, operator by operator and phase by phase.

Rows are those of :mod:`benchmarks.speed` that train, such as::

    python -m benchmarks.profile ppo --size base
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import ours, workload
from benchmarks.machine import matrix_rates
from benchmarks.options import options_of, parser_of
from benchmarks.sizes import SIZES
from benchmarks.tables import publish
from benchmarks.useful import work
from benchmarks.workload import Case

METHODS = {
    "rollout": "generate",
    "score": "score",
    "reference_logprobs": "score",
    "loss": "forward",
    "training_step": "forward",
    "manual_backward": "backward",
    "backward": "backward",
    "on_before_optimizer_step": "step",
}
"""The phase that each method of a module begins; the innermost one counts. An online ``training_step`` is none."""

PHASES = ("generate", "score", "forward", "backward", "step", "other")
_MARK = "phase: "


@dataclass
class Profile:
    """What one iteration took.

    Attributes:
        seconds: By operator and phase; an operator's own, without those that it calls.
        calls: By operator.
        wall: Of the iteration, under the profiler.
        rows: Tokens of prompt and response of every row.
    """

    seconds: Mapping[str, Mapping[str, float]]
    calls: Mapping[str, int]
    wall: float
    rows: list[tuple[int, int]] = field(default_factory=list)

    def phase(self, name: str) -> float:
        """Seconds of all operators in a phase."""
        return sum(by_phase.get(name, 0.0) for by_phase in self.seconds.values())


class Profiled(Callback):
    """Profiles one iteration, after so many of warm-up.

    Args:
        row: Of the benchmark.
        warm_up: Iterations before it.
    """

    def __init__(self, row: str, warm_up: int) -> None:
        self.row = row
        self.warm_up = warm_up
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.rows: list[tuple[int, int]] = []
        self.started = self.wall = 0.0

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Marks where each phase begins and ends."""
        for name, phase in METHODS.items():
            is_whole_iteration = name == "training_step" and not module.automatic_optimization
            if hasattr(module, name) and not is_whole_iteration:
                setattr(module, name, _marked(getattr(module, name), phase))

    def on_experience(self, trainer: Any, module: Any, experience: Any) -> None:
        """Remembers what was written."""
        self.rows = ours.rows_of(experience)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begins, when it is warm."""
        if batch_idx == self.warm_up:
            self.profiler.__enter__()
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends."""
        if batch_idx == self.warm_up:
            self.wall = time.perf_counter() - self.started
            self.profiler.__exit__(None, None, None)
            self.rows = self.rows or ours.rows_of(batch)
            trainer.should_stop = True

    def result(self) -> Profile:
        """What was found, once training is over."""
        seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        calls: dict[str, int] = defaultdict(int)
        for event in self.profiler.events():
            if event.name.startswith(_MARK):
                continue
            seconds[event.name][_phase_of(event)] += event.self_cpu_time_total / 1e6
            calls[event.name] += 1
        return Profile(seconds, calls, self.wall, self.rows)


def _marked(method: Any, phase: str) -> Any:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + phase):
            return method(*args, **kwargs)

    return inside


def _phase_of(event: Any) -> str:
    """The innermost phase around an event."""
    while event is not None:
        if event.name.startswith(_MARK):
            return event.name.removeprefix(_MARK)
        if event.name.startswith("Optimizer.step"):
            return "step"
        event = event.cpu_parent
    return "other"


def run(case: Case, warm_up: int = 1) -> Profile:
    """Profiles one iteration of this library.

    Args:
        case: What is done; its folder is to hold the network.
        warm_up: Iterations before it.

    Returns:
        What it took.
    """
    torch.set_num_threads(case.threads)
    callback = Profiled(case.row, warm_up)
    ours.fit(case, ours.module_of(case), callback)
    return callback.result()


def lines_of(found: Profile, top: int) -> list[list[str]]:
    """The table: operators by their seconds, phase by phase.

    Args:
        found: What an iteration took.
        top: How many operators are named.

    Returns:
        Cells, line by line; the first are headings.
    """
    phases = [phase for phase in PHASES if found.phase(phase) > 0]
    ordered = sorted(found.seconds, key=lambda name: -sum(found.seconds[name].values()))

    def line(name: str, by_phase: Mapping[str, float], calls: str) -> list[str]:
        total = sum(by_phase.values())
        parts = [f"{by_phase.get(phase, 0.0):.3f}" for phase in phases]
        return [name, calls, *parts, f"{total:.3f}", f"{100 * total / found.wall:.1f} %"]

    lines = [["operator", "calls", *phases, "seconds", "share"]]
    lines += [line(name, found.seconds[name], str(found.calls[name])) for name in ordered[:top]]
    rest = {phase: sum(found.seconds[name].get(phase, 0.0) for name in ordered[top:]) for phase in phases}
    everything = {phase: found.phase(phase) for phase in phases}
    lines += [line("all others", rest, str(sum(found.calls[name] for name in ordered[top:])))]
    lines += [line("all operators", everything, str(sum(found.calls.values())))]
    outside = found.wall - sum(everything.values())
    return [
        *lines,
        ["outside of operators", "", *[""] * len(phases), f"{outside:.3f}", f"{100 * outside / found.wall:.1f} %"],
    ]


def parsed(args: list[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        args: Of it.

    Returns:
        The options; what comes out is written under ``name``.
    """
    parser = parser_of("profile", __doc__)
    parser.add_argument("row", choices=[row for row in ours.RUNS if row != "generate"])
    parser.add_argument("--unfrozen", type=int, default=-1, metavar="N", help="train the top N blocks only")
    parser.add_argument("--top", type=int, default=25, help="operators that are named")
    options = options_of(parser, args)
    options.name = f"{options.row}-{options.size}-{options.lengths}"
    options.name += "" if options.unfrozen == -1 else f"-top{options.unfrozen}"
    return options


def main(args: list[str] | None = None) -> None:
    """Profiles, prints and writes.

    Args:
        args: Of the command line.
    """
    options = parsed(args)
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder), SIZES[options.size], options.lengths)
        case = Case(options.row, options.size, options.lengths, folder, options.threads, 3, options.unfrozen)
        found = run(case)

    useful, rates = work(case, "ours", found.rows), matrix_rates(options.threads)
    facts = [
        f"`{options.command}`",
        f"{options.row} {options.size} {options.lengths}: {found.wall:.2f} s under the profiler, {options.threads} "
        f"threads, useful work {sum(useful.values()):.0f} GFLOP; the best matrix products: "
        f"{', '.join(map(str, rates.values()))}. Seconds are an operator's own, without those that it calls.",
    ]
    publish(lines_of(found, options.top), facts, options.output / f"{options.name}.md")


if __name__ == "__main__":
    main()
