"""Many annotators at once before the page of ``lightning-rlhf collect``, and what became of their answers.

Each asks for a task, answers it, sends one answer in five a second time as after a lost reply, and takes one in
twenty back. At the end what the server said it had kept is compared with what is in the database. Run it with::

    python -m benchmarks.collect_load --annotators 20 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.collecting import Served, served
from lightning_rlhf.collect.store import Store

TASKS = 20_000
NEEDED = 3


class Annotator(threading.Thread):
    """Somebody who answers without thinking.

    Args:
        name: Whom the server knows.
        server: That is asked.
        until: When to end, by the monotonic clock.
    """

    def __init__(self, name: str, server: Served, until: float) -> None:
        super().__init__(name=name)
        self.server = server
        self.until = until
        self.chance = random.Random(name)
        self.kept: dict[int, list[str]] = {}  # by task the responses, the best first
        self.waits: list[float] = []
        self.error: Exception | None = None
        self._cookie = ""

    def run(self) -> None:
        """Answers until the time is over."""
        try:
            self._work()
        except Exception as error:
            self.error = error

    def _work(self) -> None:
        state = self._ask("enter", name=self.name) and self._ask("next")
        while time.monotonic() < self.until and state["task"] is not None:
            task = state["task"]
            ranks = self.chance.choice([[1, 2], [2, 1]])
            fields = {"task": task["task"], "order": task["shown"], "verdict": "preference", "ranks": ranks}
            state = self._ask("answer", **fields)
            self.kept[task["task"]] = [text for _, text in sorted(zip(ranks, task["responses"], strict=True))]
            if self.chance.random() < 0.2:
                state = self._ask("answer", **fields)
            if self.chance.random() < 0.05:
                state = self._ask("undo")
                del self.kept[state["task"]["task"]]

    def _ask(self, action: str, **fields: Any) -> dict[str, Any]:
        start = time.perf_counter()
        request = urllib.request.Request(
            f"{self.server.url}api/{action}",
            json.dumps(fields).encode(),
            {"Content-Type": "application/json", "Cookie": self._cookie},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            self._cookie = (response.headers["Set-Cookie"] or self._cookie).partition(";")[0]
            answer = json.load(response)
        self.waits.append(time.perf_counter() - start)
        return answer


def measured(folder: Path, annotators: int, seconds: float) -> dict[str, Any]:
    """Lets them work, then looks into the database.

    Args:
        folder: For the database.
        annotators: How many there are.
        seconds: How long they work.

    Returns:
        Counts of what was kept, lost and doubled, and how long the server took.
    """
    rows = [{"prompt": f"prompt {n}", "responses": [f"one {n}", f"two {n}"]} for n in range(TASKS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(folder, database="x.sqlite", prompts="rows.jsonl", answers_per_task=NEEDED) as server:
        until = time.monotonic() + seconds
        people = [Annotator(f"annotator {n}", server, until) for n in range(annotators)]
        for person in people:
            person.start()
        for person in people:
            person.join()
    errors = [person.error for person in people if person.error is not None]
    if errors:
        raise errors[0]
    store = Store(folder / "x.sqlite", must_exist=True)
    found = [((row["annotator"], row["task"]), [row["chosen"], row["rejected"]]) for row in store.preferences()]
    store.close()
    stored, kept = dict(found), {(p.name, task): said for p in people for task, said in p.kept.items()}
    waits = [wait for person in people for wait in person.waits]
    return {
        "answers": len(kept),
        "requests": len(waits),
        "lost": sum(stored.get(key) != said for key, said in kept.items()),
        "double": len(found) - len(stored),
        "not given": len(stored.keys() - kept.keys()),
        "more than a task needs": sum(count > NEEDED for count in Counter(task for _, task in stored).values()),
        "median": statistics.median(waits),
        "slowest of a hundred": statistics.quantiles(waits, n=100)[-1],
    }


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), given.annotators, given.seconds)
    table = Table(title=f"{given.annotators} annotators, {given.seconds:.0f} s")
    for name in found:
        table.add_column(name)
    table.add_row(*(f"{1000 * n:.0f} ms" if isinstance(n, float) else str(n) for n in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
