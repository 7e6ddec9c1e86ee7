"""Who gets which task, and what was answered."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lightning_rlhf.collect.answers import Answer, ConflictError, Given
from lightning_rlhf.collect.database import Database
from lightning_rlhf.collect.tasks import Task
from lightning_rlhf.data.formats import Row

_LIVE = "task = ? AND annotator = ? AND undone IS NULL"


class Store:
    """Tasks and answers.

    A task that is given to somebody is leased for a while: nobody else gets it for that long, if with the answers that
    it has it would then have enough. An answer that comes later still counts.

    Args:
        path: Of the SQLite file, which is made if it is missing.
        answers_per_task: People whose preferences a task needs. A skip is none, and leaves the task to others; a flag
            takes it from everybody.
        lease_seconds: How long a task waits for an answer before somebody else may get it.
        must_exist: Whether a missing file is an error.
        clock: Seconds since 1970.
        chance: Draws the order of the responses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        answers_per_task: int = 1,
        lease_seconds: float = 1800.0,
        must_exist: bool = False,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ) -> None:
        if answers_per_task < 1:
            raise ValueError(f"`answers_per_task={answers_per_task}` must be at least 1.")
        if not lease_seconds > 0:
            raise ValueError(f"`lease_seconds={lease_seconds}` must be positive.")
        self.database = Database(path, must_exist)
        self.answers_per_task = answers_per_task
        self.lease_seconds = lease_seconds
        self.clock = clock
        self.chance = chance or random.SystemRandom()

    def close(self) -> None:
        """Lets go of the file."""
        self.database.close()

    def add(self, tasks: Iterable[Task]) -> int:
        """Adds tasks that are not there yet, all or none.

        Args:
            tasks: In the order in which they are to be given.

        Returns:
            How many are new.
        """
        with self.database.transaction():
            return sum(
                self.database.execute(
                    "INSERT OR IGNORE INTO tasks (key, prompt, responses, sources, metadata) VALUES (?, ?, ?, ?, ?)",
                    (task.key, *map(json.dumps, (task.prompt, task.responses, task.sources, task.metadata))),
                )
                for task in tasks
            )

    def has(self, key: str) -> bool:
        """Whether there is a task with a key."""
        return self.database.value("SELECT 1 FROM tasks WHERE key = ?", (key,)) is not None

    def join(self, name: str, is_judge: bool = False) -> None:
        """Makes an annotator known.

        Args:
            name: Whose answers these are.
            is_judge: Whether it is a model; its answers are not among those that a task needs.

        Raises:
            ValueError: If a judge has the name of a person, or the other way round.
        """
        self.database.execute("INSERT OR IGNORE INTO annotators VALUES (?, ?)", (name, is_judge))
        if self.database.value("SELECT is_judge FROM annotators WHERE name = ?", (name,)) != is_judge:
            other = "person" if is_judge else "judge"
            raise ValueError(f"`name={name!r}` is that of a {other} in this database: take another.")

    def next(self, annotator: str) -> Given | None:
        """The task that somebody has, or else one that waits for them.

        Tasks that were begun come first, so that they are finished, in the order in which they were added.

        Args:
            annotator: Who has joined.

        Returns:
            The task, or None if there is nothing left for them.
        """
        now = self.clock()
        with self.database.transaction():
            task = self.database.value(
                "SELECT task FROM leases JOIN tasks ON tasks.id = task WHERE annotator = ? AND until > ? AND flags = 0",
                (annotator, now),
            )
            if task is None:
                self.database.execute("DELETE FROM leases WHERE annotator = ?", (annotator,))
                task = self._due(annotator, now)
            return None if task is None else self._give(annotator, task, now)

    def answer(self, annotator: str, task: int, shown: Sequence[int], answer: Answer) -> None:
        """Keeps what somebody says of the task that they have; saying the same a second time changes nothing.

        Args:
            annotator: Who was given the task.
            task: Its number.
            shown: In what order they saw the responses.
            answer: What they said.

        Raises:
            ConflictError: If they do not have the task, saw it in another order, or have answered otherwise before.
            ValueError: If the answer makes no sense.
        """
        now = self.clock()
        answer = answer.checked(len(shown))
        with self.database.transaction():
            before = self.database.rows(f"SELECT * FROM answers WHERE {_LIVE}", (task, annotator))
            if before:
                if before[0]["shown"] == json.dumps(list(shown)) and Answer.read(before[0], shown) == answer:
                    return
                raise ConflictError("You have answered this task already: undo that answer to change it.")
            lease = self.database.rows(
                "SELECT shown, since FROM leases WHERE task = ? AND annotator = ?", (task, annotator)
            )
            if not lease or lease[0]["shown"] != json.dumps(list(shown)):
                raise ConflictError("This task is no longer yours: load the page anew.")
            self._keep(annotator, task, answer.stored(shown), now, now - lease[0]["since"])
            self._count(task, answer.verdict, 1)
            self.database.execute("DELETE FROM leases WHERE task = ? AND annotator = ?", (task, annotator))

    def undo(self, annotator: str) -> Given | None:
        """Takes back the last answer of somebody, who has its task again, as it was shown.

        What was taken back stays in the database, and counts for nothing.

        Args:
            annotator: Whose answer it is.

        Returns:
            The task, or None if there is no answer to take back.
        """
        now = self.clock()
        with self.database.transaction():
            found = self.database.rows(
                "SELECT * FROM answers WHERE annotator = ? AND undone IS NULL ORDER BY id DESC LIMIT 1", (annotator,)
            )
            if not found:
                return None
            last = found[0]
            self.database.execute("UPDATE answers SET undone = ? WHERE id = ?", (now, last["id"]))
            self._count(last["task"], last["verdict"], -1)
            self.database.execute("DELETE FROM leases WHERE annotator = ?", (annotator,))
            return self._give(annotator, last["task"], now, last["shown"])

    def task(self, number: int) -> tuple[Any, list[str]]:
        """Prompt and responses of a task, as they are stored."""
        (row,) = self.database.rows("SELECT prompt, responses FROM tasks WHERE id = ?", (number,))
        return json.loads(row["prompt"]), json.loads(row["responses"])

    def unanswered(self, annotator: str) -> list[int]:
        """Tasks that somebody has not answered, flagged ones left out.

        Args:
            annotator: Who has joined.

        Returns:
            Their numbers, in the order in which they were added.
        """
        rows = self.database.rows(
            "SELECT id FROM tasks WHERE flags = 0 AND NOT EXISTS (SELECT 1 FROM answers WHERE task = tasks.id "
            "AND annotator = ? AND undone IS NULL) ORDER BY id",
            (annotator,),
        )
        return [row["id"] for row in rows]

    def judge(self, judge: str, task: int, answer: Answer) -> None:
        """Keeps what a judge says, who needs no lease; what it has said before stays.

        Args:
            judge: That has joined as such.
            task: Its number.
            answer: The places in the order in which the responses are stored.
        """
        count = len(self.task(task)[1])
        with self.database.transaction():
            if not self.database.rows(f"SELECT 1 FROM answers WHERE {_LIVE}", (task, judge)):
                self._keep(judge, task, answer.checked(count).stored(range(count)), self.clock(), None)

    def preferences(self, annotators: Sequence[str] | None = None) -> Iterator[Row]:
        """What counts, as rows that :class:`PreferenceDataModule` reads; of flagged tasks nothing does.

        Args:
            annotators: Whose; by default everybody's.

        Yields:
            A row for each answer.
        """
        for row in self.database.rows("SELECT annotator, row FROM preferences"):
            if annotators is None or row["annotator"] in annotators:
                yield json.loads(row["row"])

    def _due(self, annotator: str, now: float) -> int | None:
        return self.database.value(
            """
            SELECT id FROM tasks
            WHERE flags = 0 AND given < :enough
            AND NOT EXISTS (SELECT 1 FROM answers WHERE task = tasks.id AND annotator = :who AND undone IS NULL)
            AND given + (SELECT count(*) FROM leases WHERE task = tasks.id AND until > :now) < :enough
            ORDER BY given DESC, id LIMIT 1
            """,
            {"enough": self.answers_per_task, "who": annotator, "now": now},
        )

    def _give(self, annotator: str, task: int, now: float, shown: str | None = None) -> Given:
        """Leases a task, perhaps anew: the order in which it was shown stays."""
        prompt, responses = self.task(task)
        order = list(range(len(responses)))
        self.chance.shuffle(order)
        self.database.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET until = excluded.until",
            (task, annotator, shown or json.dumps(order), now, now + self.lease_seconds),
        )
        key = (task, annotator)
        order = json.loads(self.database.value("SELECT shown FROM leases WHERE task = ? AND annotator = ?", key))
        before = self.database.rows(
            "SELECT * FROM answers WHERE task = ? AND annotator = ? ORDER BY id DESC LIMIT 1", key
        )
        previous = Answer.read(before[0], order) if before else None
        return Given(task, prompt, tuple(responses[number] for number in order), tuple(order), previous)

    def _keep(self, annotator: str, task: int, columns: Sequence[Any], now: float, seconds: float | None) -> None:
        self.database.execute(
            "INSERT INTO answers (task, annotator, verdict, ranks, grade, comment, shown, seconds, answered) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (task, annotator, *columns, seconds, now),
        )

    def _count(self, task: int, verdict: str, by: int) -> None:
        """Keeps up with the answers of a person."""
        column = {"preference": "given", "flag": "flags"}.get(verdict)
        if column is not None:
            self.database.execute(f"UPDATE tasks SET {column} = {column} + ? WHERE id = ?", (by, task))
