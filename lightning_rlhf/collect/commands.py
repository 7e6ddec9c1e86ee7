"""What ``lightning-rlhf collect`` does: adds tasks, serves the page, has models judge, exports, says how far it is."""

from __future__ import annotations

import gzip
import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_rlhf.chance import run_seed
from lightning_rlhf.collect.access import Access
from lightning_rlhf.collect.judges import Judge, judge_all
from lightning_rlhf.collect.progress import counts, progress, report
from lightning_rlhf.collect.store import Store
from lightning_rlhf.collect.tasks import Prompts, Read, read_tasks
from lightning_rlhf.generation.sampling import Sampling

CHUNK = 256
"""So many prompts are answered by policies before their tasks are kept."""


class Command(ABC):
    """What can be asked for."""

    @abstractmethod
    def run(self) -> None:
        """Does it."""


@dataclass(frozen=True, kw_only=True)
class Add(Command):
    """Adds tasks to a database, which is made if it is missing; those that are there already are left alone.

    Args:
        database: The SQLite file.
        prompts: The path of a JSONL, CSV or Parquet file, or a list of rows: with ``prompt`` and ``responses``; with
            ``prompt`` and ``response``, a row for each response; with ``prompt`` alone, for ``policies`` to answer; or
            in any form that PreferenceDataModule reads.
        columns: The rows' own names for these keys, where they differ.
        policies: Names or folders of models that write responses where there are none, in turns.
        responses_per_prompt: How many they write to each prompt.
        sampling: How they draw tokens.
        batch_size: Prompts that they answer side by side.
        seed: The same seed gives the same responses.
        device: Where they are; by default on a GPU if there is one.
    """

    database: str
    prompts: Prompts = None
    columns: dict[str, str] | None = None
    policies: Sequence[str] | str = ()
    responses_per_prompt: int = 2
    sampling: Sampling = Sampling()
    batch_size: int = 32
    seed: int | None = None
    device: str | None = None

    def run(self) -> None:
        """Adds them."""
        if self.prompts is None:
            raise ValueError("`prompts` is missing: give a file of them, or a list.")
        with closing(Store(self.database)) as store:
            self.add_to(store)

    def add_to(self, store: Store) -> None:
        """Adds tasks, and says how many.

        Args:
            store: That gets them.

        Raises:
            ValueError: If there are prompts without responses, and no policy to write them.
        """
        if self.prompts is None:
            return
        read = read_tasks(self.prompts, "prompts", self.columns)
        if read.prompts and not self.policies:
            raise ValueError(
                f"`prompts` has {len(read.prompts)} rows without responses, the first of them to "
                f"{str(read.prompts[0][0])[:60]!r}: give `policies` that write some, or rows with 'responses'."
            )
        new = store.add(read.tasks)
        if read.prompts:
            new += self._sample(store, read)
        print(f"{new} tasks are new in {self.database}, which has {counts(store)[0]}.")
        for reason, rows in read.dropped.items():
            print(f"{rows} rows are left out: {reason}.")

    def _sample(self, store: Store, read: Read) -> int:
        from lightning_rlhf.collect.sampling import Writers  # which brings models along

        policies = [self.policies] if isinstance(self.policies, str) else self.policies
        seed = run_seed(self.seed)
        writers = Writers(policies, self.responses_per_prompt, self.sampling, self.batch_size, seed, self.device)
        rows = [row for row in read.prompts if not store.has(writers.key(row[0]))]
        new = 0
        for start in range(0, len(rows), CHUNK):
            before = len(read.tasks)
            for task in writers.tasks(rows[start : start + CHUNK]):
                read.add(task)
            new += store.add(read.tasks[before:])
        return new


@dataclass(frozen=True, kw_only=True)
class Serve(Add):
    """Serves the page on which people compare responses, after adding tasks if ``prompts`` are given.

    Args:
        host: The address to serve on. Beyond this machine tokens are required.
        port: The port; 0 takes a free one.
        token: What everybody has to know to answer.
        annotators: Who may answer: a list of names, or a token for each name, which then says who somebody is. By
            default whoever gives a name.
        answers_per_task: People whose preferences a task needs.
        lease_minutes: How long a task waits for an answer before somebody else may get it.
        title: Above the page.
        instructions: What makes a response better, in your words.
        choose: Of three responses or more, whether all are put in order (rank) or only the best is chosen.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    annotators: dict[str, str] | list[str] | None = None
    answers_per_task: int = 1
    lease_minutes: float = 30.0
    title: str = "Which response is better?"
    instructions: str | None = None
    choose: Literal["rank", "best"] = "rank"

    def run(self) -> None:
        """Serves until it is ended."""
        try:
            import uvicorn

            from lightning_rlhf.collect.server import Page, Server
        except ImportError as error:
            raise ImportError(
                f"the page needs what `pip install lightning-rlhf[collect]` installs ({error.name} is not there)."
            ) from error
        if not self.lease_minutes > 0:
            raise ValueError(f"`lease_minutes={self.lease_minutes}` must be positive.")
        lease = 60.0 * self.lease_minutes
        store = Store(self.database, answers_per_task=self.answers_per_task, lease_seconds=lease)
        with closing(store), self._listener() as listener:
            access = Access(store.database, self.host, self.token, self.annotators)
            self.add_to(store)
            tasks, done, _ = counts(store)
            if not tasks:
                raise ValueError(f"`database={self.database!r}` has no tasks: give `prompts`.")
            is_open = access.token is None and not access.tokens
            hosts = ["localhost", "127.0.0.1", "::1", "[::1]", self.host] if is_open else None
            app = Server(store, access, Page(self.title, self.instructions, self.choose)).app(hosts)
            name = f"[{self.host}]" if ":" in self.host else self.host
            print(f"{tasks} tasks, {done} of them done, at http://{name}:{listener.getsockname()[1]}/", flush=True)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
            uvicorn.Server(config).run(sockets=[listener])

    def _listener(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            if not 0 <= self.port < 2**16:
                raise OSError("there is no such port")
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise ValueError(
                f"`host={self.host!r}`, `port={self.port}` cannot be listened on ({error}): give another `port`, 0 for "
                "any that is free."
            ) from error


@dataclass(frozen=True, kw_only=True)
class LetJudge(Add):
    """Has a model judge all tasks that it has not judged, after adding tasks if ``prompts`` are given.

    Args:
        judge: ChatJudge, RewardJudge, or a class of yours.
        tasks_at_once: How many it gets at a time; their answers are then kept.
    """

    judge: Judge
    tasks_at_once: int = 16

    def run(self) -> None:
        """Judges."""
        with closing(Store(self.database, must_exist=self.prompts is None)) as store:
            self.add_to(store)
            done = judge_all(store, self.judge, self.tasks_at_once)
            print(f"{self.judge.name} has judged {done} tasks.")
            report(progress(store))


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Writes preferences as JSONL, a row for each answer, as PreferenceDataModule reads them.

    Args:
        database: The SQLite file.
        output: The file to write, compressed if it ends with ``.gz``; one that is there is replaced.
        annotators: Whose answers; by default everybody's.
    """

    database: str
    output: str
    annotators: list[str] | None = None

    def run(self) -> None:
        """Writes them, whole or not at all."""
        with closing(Store(self.database, must_exist=True)) as store:
            self._write(store)

    def _write(self, store: Store) -> None:
        known = [row["name"] for row in store.database.rows("SELECT name FROM annotators ORDER BY name")]
        for name in self.annotators or []:
            if name not in known:
                raise ValueError(f"`annotators` names {name!r}, who must be one of {', '.join(map(repr, known))}.")
        path = Path(self.output)
        partial = path.with_name(f".{path.name}.part")
        written = 0
        with (gzip.open if path.suffix == ".gz" else open)(partial, "wt", encoding="utf-8") as lines:
            for row in store.preferences(self.annotators):
                lines.write(json.dumps(row) + "\n")
                written += 1
        os.replace(partial, path)
        others = store.database.value("SELECT count(*) FROM answers WHERE undone IS NULL AND verdict <> 'preference'")
        flagged = counts(store)[2]
        print(
            f"{written} preferences are in {path}. Not in it: {others} skips and flags, and what others said of the "
            f"{flagged} flagged tasks."
        )


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Says how far the work is, and how far annotators agree.

    Args:
        database: The SQLite file.
        answers_per_task: People whose preferences a task needs.
    """

    database: str
    answers_per_task: int = 1

    def run(self) -> None:
        """Prints it."""
        with closing(Store(self.database, answers_per_task=self.answers_per_task, must_exist=True)) as store:
            report(progress(store))
