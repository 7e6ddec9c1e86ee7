"""Tables of what was measured, and the sentences that go below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.alternation import Result
from benchmarks.machine import MatrixRate
from benchmarks.useful import PHASES
from benchmarks.workload import Case

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


def times_as_fast(result: Result, baseline: Result) -> float:
    """How much more of a row's work a system does in a second than another.

    Args:
        result: Of a system.
        baseline: Of the other, on the same row.

    Returns:
        The ratio of their medians.
    """
    if result.case.row == "sft_packed":
        return result.tokens_per_second / baseline.tokens_per_second
    return median(baseline.seconds()) / median(result.seconds())


def cells(result: Result, rate: float, baseline: Result) -> list[str]:
    """A line of the table.

    Args:
        result: Of a system.
        rate: Of matrix products, in GFLOP a second.
        baseline: Of the system that it is compared with, the last one of its row.

    Returns:
        A text for each of :data:`HEADINGS`.
    """
    case = result.case
    phases = [f"{median(result.seconds(phase)):.2f}" if result.seconds(phase) else "" for phase in PHASES]
    return [
        f"{case.row} {case.size} {case.lengths}{trains(case)}",
        result.system,
        spread(result.seconds()),
        *phases,
        f"{times_as_fast(result, baseline):.2f}",
        f"{result.response_length:.0f}",
        f"{result.tokens_per_second:.0f}",
        f"{100 * (result.share(rate) or 0.0):.0f} %",
        f"{result.peak:.2f}",
        iterations(result),
    ]


def trains(case: Case) -> str:
    """What is added to a row's name where only some blocks train.

    Args:
        case: What a system does.

    Returns:
        Such as ``", top 2"``; empty where all train.
    """
    top = "" if case.num_layers_unfrozen == -1 else f", top {case.num_layers_unfrozen}"
    return top + (", compiled" if case.compiles else "")


def spread(seconds: Sequence[float]) -> str:
    """What iterations took, in the middle and at the extremes.

    Args:
        seconds: Of each.

    Returns:
        A text for a cell.
    """
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def iterations(result: Result) -> str:
    """How many iterations count, and how quiet the machine was.

    Args:
        result: Of a system.

    Returns:
        A text for a cell.
    """
    dropped = f", {result.dropped} dropped" if result.dropped else ""
    return f"{len(result.iterations)}{dropped}{disturbance(result.disturbed)}"


def disturbance(count: int) -> str:
    """What is said of iterations that count although other processes used the machine.

    Args:
        count: How many they are.

    Returns:
        The end of a text for a cell; empty where there are none.
    """
    return f", {count} DISTURBED" if count else ""


def lines_of(results: Sequence[Result], rate: float) -> list[list[str]]:
    """The lines of one row: every system, and TRL's PPO once more without the time of its reward network.

    Args:
        results: Of all systems, ours first.
        rate: Of matrix products, in GFLOP a second.

    Returns:
        Cells, line by line.
    """
    lines = [cells(result, rate, results[-1]) for result in results]
    for result in results:
        without = result.without_reward_network()
        if without is not None:
            line = [""] * len(HEADINGS)
            line[1:3] = f"{result.system}, no reward network", f"{without:.2f}"
            line[HEADINGS.index("times as fast")] = f"{median(results[-1].seconds()) / without:.2f}"
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


def publish(lines: Sequence[Sequence[str]], facts: Sequence[str], path: Path) -> None:
    """Prints a table, and writes it for a page of text.

    Args:
        lines: Cells, line by line; the first are headings.
        facts: Sentences to go below it.
        path: Of the Markdown.
    """
    heading, *rest = lines
    table = Table(*heading)
    for line in rest:
        table.add_row(*line)
    Console(width=max(Console().width, 170)).print(table, *facts, sep="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown_table(lines, facts))


def facts_of(
    done: Sequence[Sequence[Result]], rates: Mapping[str, MatrixRate], threads: int, command: str
) -> list[str]:
    """What must be known to read the table.

    Args:
        done: Results, row by row.
        rates: Of matrix products.
        threads: Of torch.
        command: That made it.

    Returns:
        Sentences.
    """
    results = [result for row in done for result in row]
    versions = {system: r.iterations[0]["versions"] for r in results for system in [f"{r.system} ({r.case.row})"]}
    facts = [f"`{command}`", f"{threads} threads; the best matrix products: {', '.join(map(str, rates.values()))}."]
    facts += [fact for row in done for fact in without_reward_networks(row)]
    if any(r.case.row == "sft_packed" for r in results):
        facts.append("`sft_packed` is compared in tokens a second, prompts included and padding not.")
    if any(r.system == "ours_mkl" for r in results):
        facts.append("`ours_mkl` is this library without oneDNN: its matrix products are those that TRL's are.")
    by_text: dict[str, list[str]] = {}
    for system, found in versions.items():
        by_text.setdefault(", ".join(f"{name} {number}" for name, number in found.items()), []).append(system)
    facts += [f"{', '.join(systems)}: {text}." for text, systems in by_text.items()]
    if any(r.disturbed for r in results):
        facts.append("DISTURBED: other processes used the machine; only ratios, and only roughly, mean anything.")
    return facts


def without_reward_networks(results: Sequence[Result]) -> list[str]:
    """How much faster than TRL's PPO this library is if the time of TRL's reward network does not count.

    Args:
        results: Of a row.

    Returns:
        A sentence for every pair of this library and a system that has such a network.
    """
    return [
        f"{mine.case.row}{trains(mine.case)}: {mine.system} is {without / median(mine.seconds()):.2f} times as fast as "
        f"{peer.system} without the time of its reward network."
        for peer in results
        for mine in results
        if (without := peer.without_reward_network()) is not None and mine.system.startswith("ours")
    ]
