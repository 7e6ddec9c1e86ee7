"""What an update costs when only the top n of N blocks train, in matrix work and in time.

Frozen blocks run once, while the responses are written, and never in the epochs. With h the work of the vocabulary
head and b that of a block, updates of n blocks should thus cost (h + n b) / (h + N b) of those of all N; what is
executed may be at most 1.2 times as much. Run it with::

    python -m benchmarks.unfrozen --size base --lengths full

The table and the curve are written to ``outputs/unfrozen/``; ``--iterations 0`` counts, and times nothing.
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

import torch
from lightning.pytorch.callbacks import Callback

from benchmarks import ours, useful, workload
from benchmarks.alternation import Entrant, measure
from benchmarks.counting import MatrixWork
from benchmarks.options import add_iterations, options_of, parser_of
from benchmarks.sizes import SIZES
from benchmarks.tables import disturbance, publish, spread
from benchmarks.workload import Case

ALLOWED = 1.2
"""How many times the share of the blocks that train the counted work may be."""

HEADINGS = ("top blocks", "GFLOP", "of all", "at most", "seconds (min to max)", "of all", "GFLOP/s")


class CountsUpdates(Callback):
    """Counts the matrix work of the first iteration's updates, and ends training.

    Attributes:
        work: That was counted.
        rows: Tokens of prompt and response of every row that was learnt from.
    """

    def __init__(self) -> None:
        self.work = MatrixWork()
        self.rows: list[tuple[int, int]] = []

    def on_experience(self, trainer: Any, module: Any, experience: Any) -> None:
        """Begins before the updates."""
        self.rows = ours.rows_of(experience)
        self.work.__enter__()

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Ends after them."""
        self.work.__exit__(None, None, None)
        trainer.should_stop = True


@dataclass(frozen=True)
class Cost:
    """Of an iteration's updates with some blocks frozen.

    Attributes:
        top: Blocks that train.
        counted: GFLOP that were executed.
        needed: GFLOP of head and blocks that train, as :mod:`benchmarks.useful` counts them.
        seconds: Of every iteration.
        disturbed: How many of them were, because the machine was never quiet.
    """

    top: int
    counted: float
    needed: float
    seconds: list[float]
    disturbed: int = 0

    def bound(self, whole: Cost) -> float:
        """What share of the work of all blocks is allowed.

        Args:
            whole: Cost with all blocks.
        """
        return ALLOWED * self.needed / whole.needed

    def is_low(self, whole: Cost) -> bool:
        """Whether the counted share is within that.

        Args:
            whole: Cost with all blocks.
        """
        return self.counted / whole.counted <= self.bound(whole)


def count(case: Case) -> tuple[float, float]:
    """Runs one iteration and counts the matrix work of its updates.

    Args:
        case: What is done.

    Returns:
        GFLOP that were executed, and that were needed.
    """
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    counts = CountsUpdates()
    ours.fit(case, ours.module_of(case), counts)
    return counts.work.gflop, useful.work(case, "ours", counts.rows)["optimise"]


def lines_of(costs: Sequence[Cost]) -> list[list[str]]:
    """The table.

    Args:
        costs: The last with all blocks.

    Returns:
        Cells, line by line.
    """
    whole = costs[-1]
    lines = []
    for cost in costs:
        seconds = [""] * 3
        if cost.seconds:
            middle = median(cost.seconds)
            seconds = [
                spread(cost.seconds) + disturbance(cost.disturbed),
                f"{middle / median(whole.seconds):.3f}",
                f"{cost.counted / middle:.0f}",
            ]
        share, bound = f"{cost.counted / whole.counted:.3f}", f"{cost.bound(whole):.3f}"
        lines.append([str(cost.top), f"{cost.counted:.1f}", share, bound, *seconds])
    return lines


def draw(costs: Sequence[Cost], title: str, path: Path) -> None:
    """Draws work and time over the number of blocks that train.

    Args:
        costs: The last with all blocks.
        title: Above it.
        path: PNG to write.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("The curve needs matplotlib: `pip install matplotlib`, or `--no-curve`.") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    whole, tops = costs[-1], [cost.top for cost in costs]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=80)
    axes.plot(tops, [cost.bound(whole) / ALLOWED for cost in costs], "k:", label="(h + n b) / (h + N b)")
    axes.plot(tops, [cost.bound(whole) for cost in costs], "k--", label=f"{ALLOWED} times that: allowed")
    axes.plot(tops, [cost.counted / whole.counted for cost in costs], "o-", label="matrix work, counted")
    if whole.seconds:
        axes.plot(tops, [median(c.seconds) / median(whole.seconds) for c in costs], "s-", label="seconds")
    axes.set(xlabel=f"blocks that train, of {whole.top}", ylabel="share of the updates of all", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def parsed(args: list[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        args: Of it.

    Returns:
        The options; the last of ``tops`` is all blocks, and what comes out is written under ``name``.
    """
    parser = parser_of("unfrozen", __doc__)
    add_iterations(parser, 5)
    parser.add_argument("--row", choices=["ppo", "grpo", "grpo_mu"], default="ppo")
    parser.add_argument("--tops", type=int, nargs="+", metavar="N", help="blocks that train; 1 to all by default")
    parser.add_argument("--no-curve", dest="curve", action="store_false", help="draw nothing")
    options = options_of(parser, args, fewest=0)
    layers = SIZES[options.size].layers
    options.tops = sorted({*(options.tops or range(1, layers + 1)), layers})
    if not 1 <= options.tops[0] <= options.tops[-1] <= layers:
        parser.error(f"--tops {options.tops} must lie between 1 and the network's {layers} blocks")
    options.name = f"{options.row}-{options.size}-{options.lengths}"
    return options


def main(args: list[str] | None = None) -> None:
    """Counts, times, prints, writes and draws; fails where more is executed than allowed.

    Args:
        args: Of the command line.
    """
    options = parsed(args)
    options.output.mkdir(parents=True, exist_ok=True)
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as folder:
        workload.save(Path(folder), SIZES[options.size], options.lengths)
        for top in options.tops:
            case = Case(options.row, options.size, options.lengths, folder, options.threads, options.attempts + 2, top)
            seconds, disturbed = list[float](), 0
            if options.iterations:
                entrants = [Entrant("ours", Path(sys.executable), case)]
                (timed,) = measure(entrants, options.iterations, options.attempts, options.others, options.output)
                seconds, disturbed = timed.seconds("optimise"), timed.disturbed
            costs.append(Cost(top, *count(case), seconds, disturbed))
            print(f"top {top}: {costs[-1].counted:.1f} GFLOP", flush=True)
    what = f"{options.row} {options.size} {options.lengths}"
    facts = [
        f"`{options.command}`",
        f"Updates of an iteration, {what}, {options.threads} threads; GFLOP that were executed, padding and all.",
    ]
    if options.curve:
        figure = f"figures/unfrozen-{options.name}.png"
        draw(costs, what, options.output / figure)
        facts += ["", f"![work and time over the blocks that train]({figure})"]
    publish([HEADINGS, *lines_of(costs)], facts, options.output / f"{options.name}.md")
    wasteful = [cost.top for cost in costs if not cost.is_low(costs[-1])]
    if wasteful:
        raise SystemExit(f"updates of the top {wasteful} blocks execute more than is allowed")


if __name__ == "__main__":
    main()
