"""The SQLite file in which tasks and answers are: its tables, and how they are written to."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION = 1

OLDEST = (3, 38)
"""Version of SQLite that has the operators ``->`` and ``->>``."""

TABLES = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,            -- the same task is there once, however often its file is read
    given INTEGER NOT NULL DEFAULT 0,    -- preferences of people
    flags INTEGER NOT NULL DEFAULT 0,
    prompt TEXT NOT NULL,                -- these four are JSON
    responses TEXT NOT NULL,
    sources TEXT NOT NULL,
    metadata TEXT NOT NULL
);
CREATE INDEX due ON tasks (flags, given DESC, id);

CREATE TABLE annotators (name TEXT PRIMARY KEY, is_judge INTEGER NOT NULL) WITHOUT ROWID;

CREATE TABLE leases (
    task INTEGER NOT NULL REFERENCES tasks,
    annotator TEXT NOT NULL REFERENCES annotators,
    shown TEXT NOT NULL,                 -- numbers of the responses, from left to right
    since REAL NOT NULL,
    until REAL NOT NULL,
    PRIMARY KEY (task, annotator)
) WITHOUT ROWID;
CREATE INDEX lessee ON leases (annotator);

CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    task INTEGER NOT NULL REFERENCES tasks,
    annotator TEXT NOT NULL REFERENCES annotators,
    verdict TEXT NOT NULL CHECK (verdict IN ('preference', 'skip', 'flag')),
    ranks TEXT,                          -- places of the responses, 1 for the best
    grade INTEGER,
    comment TEXT,
    shown TEXT NOT NULL,
    seconds REAL,
    answered REAL NOT NULL,
    undone REAL,
    CHECK ((verdict = 'preference') = (ranks IS NOT NULL))
);
CREATE UNIQUE INDEX one_answer ON answers (task, annotator) WHERE undone IS NULL;
CREATE INDEX latest ON answers (annotator, id);

-- What counts, as rows of a PreferenceDataModule. JSON stays JSON throughout, so that no text is decoded on the way.
CREATE VIEW preferences AS
WITH counted AS (
    SELECT
        answers.*, tasks.prompt, tasks.responses, tasks.sources, tasks.metadata,
        (ranks ->> 0) > (ranks ->> 1) AS best,
        json_array_length(tasks.responses) = 2 AS is_pair,
        (ranks ->> 0) = (ranks ->> 1) AS is_tie
    FROM answers JOIN tasks ON tasks.id = answers.task
    WHERE verdict = 'preference' AND undone IS NULL AND flags = 0
)
SELECT id, task, annotator, json_patch(metadata, CASE WHEN is_pair THEN json_object(
    'prompt', json(prompt),
    'chosen', json(responses -> best),
    'rejected', json(responses -> (1 - best)),
    'tie', CASE WHEN is_tie THEN json('true') END,
    'grade', grade,
    'sources', CASE WHEN sources ->> 0 IS NOT NULL THEN json_array(sources -> best, sources -> (1 - best)) END,
    'annotator', annotator, 'comment', comment, 'task', task
) ELSE json_object(
    'prompt', json(prompt),
    'responses', json(responses),
    'ranks', json(ranks),
    'sources', CASE WHEN sources ->> 0 IS NOT NULL THEN json(sources) END,
    'annotator', annotator, 'comment', comment, 'task', task
) END) AS row
FROM counted ORDER BY task, id;
"""


class Database:
    """A connection that threads take turns with, and other processes too.

    Args:
        path: Of the file, which is made if it is missing.
        must_exist: Whether a missing file is an error instead.
    """

    def __init__(self, path: str | os.PathLike[str], must_exist: bool = False) -> None:
        self.path = Path(path)
        name = f"`database={str(path)!r}`"
        if self.path.suffix != ".sqlite":
            raise ValueError(f"{name} must end with .sqlite, by which the DataModules know what it is.")
        if must_exist and not self.path.is_file():
            raise FileNotFoundError(f"{name}: there is no such file (looked in {Path.cwd()}).")
        if sqlite3.sqlite_version_info < OLDEST:
            raise ImportError(
                f"SQLite {sqlite3.sqlite_version} is too old, and must be {'.'.join(map(str, OLDEST))} at least: take "
                "a Python that brings a newer one."
            )
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            version = self.value("PRAGMA user_version")
            tables = self.value("SELECT count(*) FROM sqlite_schema")
            if tables and version != VERSION:
                raise ValueError(f"{name} is a database of another kind, or version: give the name of a new file.")
            self._connection.execute("PRAGMA journal_mode = WAL")
            # Each answer is on the disk before the page says so. NORMAL would lose the last ones when power fails;
            # one answer in some seconds does not feel what a sync takes.
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            with self.transaction():
                if self.value("PRAGMA user_version") != VERSION:  # another process may have been faster
                    for statement in _statements(TABLES):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.OperationalError as error:
            raise ValueError(
                f"{name} cannot be opened: {error}. Is there such a folder, and may it be written?"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{name} is no SQLite database: {error}. Give the name of a new file.") from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is there, or nothing; nobody else writes meanwhile."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, arguments: Sequence[Any] | dict[str, Any] = ()) -> list[sqlite3.Row]:
        """What a query gives.

        Args:
            query: In SQL.
            arguments: For its question marks, or names.

        Returns:
            The rows.
        """
        with self._lock:
            return self._connection.execute(query, arguments).fetchall()

    def value(self, query: str, arguments: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """The first column of the first row that a query gives; None if there is no row.

        Args:
            query: In SQL.
            arguments: For its question marks, or names.

        Returns:
            The value.
        """
        found = self.rows(query, arguments)
        return found[0][0] if found else None

    def execute(self, statement: str, arguments: Sequence[Any] | dict[str, Any] = ()) -> int:
        """Writes.

        Args:
            statement: In SQL.
            arguments: For its question marks, or names.

        Returns:
            How many rows were changed.
        """
        with self._lock:
            return self._connection.execute(statement, arguments).rowcount

    def setting(self, key: str, default: str) -> str:
        """What is kept under a key; at first the default.

        Args:
            key: Any.
            default: Its value, where there is none yet.

        Returns:
            The value.
        """
        self.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (key, default))
        return str(self.value("SELECT value FROM settings WHERE key = ?", (key,)))

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._connection.close()


def _statements(script: str) -> Iterator[str]:
    """One by one: `executescript` would commit the transaction that they belong to."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
