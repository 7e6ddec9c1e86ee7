"""How far the work is, and how far annotators agree."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lightning_rlhf.collect.agreement import kappas, krippendorff_alpha, pairwise_labels
from lightning_rlhf.collect.store import Store


@dataclass(frozen=True, slots=True)
class Work:
    """What one annotator has done.

    Attributes:
        name: Of the annotator.
        is_judge: Whether it is a model.
        preferences: How often something was preferred, ties included.
        ties: Of these, all responses equally good.
        skips: How often nothing could be said.
        flags: How often something was wrong.
        seconds: The median time that an answer took.
        left: Of the pairs with a better response, the share in which that stood on the left.
    """

    name: str
    is_judge: bool
    preferences: int
    ties: int
    skips: int
    flags: int
    seconds: float
    left: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is.

    Attributes:
        tasks: How many there are.
        done: Those with as many preferences of people as they need.
        flagged: Those that were taken out.
        work: What each annotator has done.
        alpha: Krippendorff's coefficient over all annotators.
        units: How many pairs of responses two or more have compared.
        kappas: Of every two annotators their names, Cohen's coefficient, and the pairs that both have compared.
    """

    tasks: int
    done: int
    flagged: int
    work: tuple[Work, ...]
    alpha: float
    units: int
    kappas: tuple[tuple[str, str, float, int], ...]


def counts(store: Store) -> tuple[int, int, int]:
    """Tasks, those that are done, and those that are flagged."""
    (row,) = store.database.rows(
        "SELECT count(*), count(*) FILTER (WHERE given >= ? AND flags = 0), count(*) FILTER (WHERE flags > 0) "
        "FROM tasks",
        (store.answers_per_task,),
    )
    return tuple(row)


def answers_of(store: Store, annotator: str) -> int:
    """How many answers somebody has given."""
    return store.database.value("SELECT count(*) FROM answers WHERE annotator = ? AND undone IS NULL", (annotator,))


def progress(store: Store) -> Progress:
    """Reads how far the work is.

    Args:
        store: Of tasks and answers.

    Returns:
        What is known; agreement is that on tasks which nobody has flagged.
    """
    units: defaultdict[Hashable, dict[str, int]] = defaultdict(dict)
    verdicts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for row in store.database.rows(
        "SELECT answers.*, key, flags FROM answers JOIN tasks ON tasks.id = task WHERE undone IS NULL "
        "ORDER BY answers.id"
    ):
        name, count = row["annotator"], verdicts[row["annotator"]]
        count[row["verdict"]] += 1
        if row["seconds"] is not None:
            seconds[name].append(row["seconds"])
        if row["ranks"] is None:
            continue
        ranks, shown = json.loads(row["ranks"]), json.loads(row["shown"])
        count["tie"] += len(set(ranks)) == 1
        if len(ranks) == 2 and ranks[0] != ranks[1] and row["seconds"] is not None:  # a judge sees no left or right
            count["left" if ranks[shown[0]] == 1 else "right"] += 1
        if not row["flags"]:
            for unit, label in pairwise_labels(row["key"], ranks):
                units[unit][name] = label
    work = tuple(
        Work(
            name=row["name"],
            is_judge=bool(row["is_judge"]),
            preferences=verdicts[row["name"]]["preference"],
            ties=verdicts[row["name"]]["tie"],
            skips=verdicts[row["name"]]["skip"],
            flags=verdicts[row["name"]]["flag"],
            seconds=statistics.median(seconds[row["name"]] or [math.nan]),
            left=_share(verdicts[row["name"]]),
        )
        for row in store.database.rows("SELECT * FROM annotators ORDER BY is_judge, name")
    )
    return Progress(
        *counts(store),
        work,
        krippendorff_alpha([list(labels.values()) for labels in units.values()]),
        sum(len(labels) > 1 for labels in units.values()),
        tuple(kappas(units)),
    )


def _share(verdicts: Counter[str]) -> float:
    pairs = verdicts["left"] + verdicts["right"]
    return verdicts["left"] / pairs if pairs else math.nan


def shown(number: float, digits: int = 2) -> str:
    """A number as people read it, or a dash where there is none."""
    return "–" if math.isnan(number) else f"{number:.{digits}f}"


def report(state: Progress) -> None:
    """Prints how far the work is.

    Args:
        state: What :func:`progress` read.
    """
    table = Table("annotator", "preferences", "ties", "skips", "flags", "seconds", "left won")
    for work in state.work:
        numbers = map(str, (work.preferences, work.ties, work.skips, work.flags))
        name = f"{work.name} (judge)" if work.is_judge else work.name
        table.add_row(name, *numbers, shown(work.seconds, 1), shown(work.left))
    console = Console(soft_wrap=True)
    lines = [f"{state.done} of {state.tasks} tasks are done, {state.flagged} flagged."]
    if state.units:
        lines.append(
            f"Krippendorff's alpha {shown(state.alpha)} over {state.units} pairs that two or more have compared."
        )
    lines += [f"Cohen's kappa of {a} and {b}: {shown(kappa)} over {n} pairs." for a, b, kappa, n in state.kappas]
    console.print(table, *lines, sep="\n", highlight=False, markup=False)
