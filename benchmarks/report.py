"""Puts what the benchmarks wrote to ``outputs/`` into the pages that show it.

A page has regions such as::

    <!-- begin: speed/ppo-base-full -->
    <!-- end: speed/ppo-base-full -->

and what lies between is replaced by ``outputs/speed/ppo-base-full.md``, its figures copied beside the page. The region
``speed/summary`` gets one line for every row in ``outputs/speed/*.json``. A region that was not measured stays as it
is. Run it with::

    python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from benchmarks.alternation import ROOT
from benchmarks.sizes import SIZES, Size
from benchmarks.speed import PEERS
from benchmarks.tables import markdown_table

PAGES = ("README.md", "docs/performance.md", "docs/performance_gpu.md")

SUMMARY = "speed/summary"

HEADINGS = (
    "",
    "ours, seconds",
    "theirs, seconds",
    "times as fast",
    "of matrix rate",
    "peak memory, GiB",
)

_REGION = re.compile(r"(<!-- begin: (?P<name>\S+) -->\n)(?P<text>.*?)(<!-- end: (?P=name) -->)", re.DOTALL)
_MARK = re.compile(r"<!-- (begin|end): (\S+) -->")
_FIGURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def filled(page: Path, outputs: Path) -> list[str]:
    """Replaces the regions of a page by what was measured.

    Args:
        page: Markdown, written in place.
        outputs: Folder of the benchmarks' outputs.

    Returns:
        Names of its regions that nothing was measured for.

    Raises:
        ValueError: If a region has no beginning or no end.
    """
    text = page.read_text()
    names = [match["name"] for match in _REGION.finditer(text)]
    marks = [mark for name in names for mark in (("begin", name), ("end", name))]
    if _MARK.findall(text) != marks:
        raise ValueError(f"`{page}` must begin and end its regions by turns: {_MARK.findall(text)}.")
    missing: list[str] = []

    def region(match: re.Match[str]) -> str:
        name = match["name"]
        found = summary(outputs / "speed") if name == SUMMARY else _read(outputs / f"{name}.md")
        if found is None:
            missing.append(name)
            return match[0]
        for figure in _FIGURE.findall(found):
            target = page.parent / figure
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile((outputs / name).parent / figure, target)
        return f"{match[1]}\n{found.strip()}\n\n{match[4]}"

    page.write_text(_REGION.sub(region, text))
    return missing


def summary(folder: Path) -> str | None:
    """One short line for every row that was measured on a CPU beside somebody else, and the commands.

    Args:
        folder: With what :mod:`benchmarks.speed` wrote.

    Returns:
        A table in Markdown, of responses at full length before ragged ones; None where there is nothing.
    """
    lines: list[list[str]] = []
    commands: list[str] = []
    everything = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for measured in sorted((one for one in everything if not _size(one).on_gpu), key=_place):
        by_row: dict[str, list[dict[str, Any]]] = {}
        for result in measured["results"]:
            by_row.setdefault(result["case"]["row"], []).append(result)
        here = [
            _line(mine, theirs)
            for name, (*row, theirs) in by_row.items()
            if theirs["system"] == PEERS[name] and {r["system"] for r in row} == {"ours"}
            for mine in row
        ]
        if here:
            lines += here
            commands.append(f"`{measured['command']}`")
    if not lines:
        return None
    made = "By " + ", ".join(commands) + "; medians, each system in turn on the same work."
    return markdown_table([HEADINGS, *lines], [made])


def _size(measured: dict[str, Any]) -> Size:
    """Of the network that a command measured."""
    return SIZES[measured["results"][0]["case"]["size"]]


def _place(measured: dict[str, Any]) -> tuple[int, bool, int]:
    """Of what a command measured, in the table: by size, lengths and what trains, everything before the top blocks."""
    case = measured["results"][0]["case"]
    return list(SIZES).index(case["size"]), case["lengths"] != "full", case["num_layers_unfrozen"]


def _line(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    case = ours["case"]
    trains = "" if case["num_layers_unfrozen"] == -1 else f", top {case['num_layers_unfrozen']} blocks"
    seconds = [f"{result['seconds']['median']:.1f}" for result in (ours, theirs)]
    if case["row"] == "sft_packed":
        rates = [f"{result['tokens_per_second']:.0f} tokens/s" for result in (ours, theirs)]
        seconds = [f"{s} ({rate})" for s, rate in zip(seconds, rates, strict=True)]
    shares, peaks = (
        f"{form(ours)}, {theirs['system']} {form(theirs)}"
        for form in (lambda r: f"{100 * r['share_of_matrix_rate']['whole']:.0f} %", lambda r: f"{r['peak_gib']:.1f}")
    )
    disturbed = ", DISTURBED" if ours["disturbed"] or theirs["disturbed"] else ""
    name = f"{case['row']}, {case['size']}, {case['lengths']}{trains}{disturbed}"
    return [name, *seconds, f"{ours['times_as_fast']:.1f}", shares, peaks]


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def main(args: list[str] | None = None) -> None:
    """Fills all pages, and says what was not measured.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, default=[ROOT / page for page in PAGES], help="Markdown")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="folder of what was measured")
    options = parser.parse_args(args)
    for page in options.pages:
        for name in filled(page, options.outputs):
            print(f"{page}: nothing in {options.outputs / name}.*")


if __name__ == "__main__":
    main()
