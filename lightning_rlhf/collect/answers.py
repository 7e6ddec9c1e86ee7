"""What annotators are given, and what they say of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

GRADES = ("slightly", "clearly", "much")
"""How much better a response is, from 1."""

LONGEST_COMMENT = 10_000
"""Characters."""


class ConflictError(Exception):
    """An answer that does not fit what is in the database."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What somebody said of a task.

    Attributes:
        verdict: ``"preference"``, ``"skip"`` (cannot say) or ``"flag"`` (something is wrong with the task).
        ranks: Of a preference, the places of the responses as they were shown, from left to right; 1 is the best, and
            equal ones tie.
        grade: How much better the better one of two is: 1 slightly, 2 clearly, 3 much.
        comment: Whatever else there is to say.
    """

    verdict: Literal["preference", "skip", "flag"]
    ranks: tuple[int, ...] | None = None
    grade: int | None = None
    comment: str | None = None

    def checked(self, count: int) -> Answer:
        """Refuses what makes no sense.

        Args:
            count: Number of responses.

        Returns:
            The answer, its places without gaps.

        Raises:
            ValueError: If a field does not fit, with its name and value.
        """
        if self.verdict not in ("preference", "skip", "flag"):
            raise ValueError(f"`verdict={self.verdict!r}` must be 'preference', 'skip' or 'flag'.")
        ranks = self._places(count)
        if self.grade is not None:
            if type(self.grade) is not int or not 1 <= self.grade <= len(GRADES):
                raise ValueError(f"`grade={self.grade!r}` must be a whole number from 1 to {len(GRADES)}, or None.")
            if ranks is None or count != 2 or ranks[0] == ranks[1]:
                raise ValueError(f"`grade={self.grade}` needs two responses, one of which is better.")
        comment = self.comment
        if comment is not None:
            if not isinstance(comment, str) or len(comment) > LONGEST_COMMENT:
                raise ValueError(f"`comment` must be text of at most {LONGEST_COMMENT} characters.")
            comment = comment.encode("utf-8", "replace").decode("utf-8").strip() or None
        return Answer(self.verdict, ranks, self.grade, comment)

    def _places(self, count: int) -> tuple[int, ...] | None:
        if self.verdict != "preference":
            if self.ranks is not None:
                raise ValueError(f"`verdict={self.verdict!r}` goes without `ranks`.")
            return None
        ranks = self.ranks
        if not isinstance(ranks, tuple) or len(ranks) != count or not all(type(rank) is int for rank in ranks):
            raise ValueError(f"`ranks={ranks!r}` must be {count} whole numbers, one for each response.")
        places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
        return tuple(places[rank] for rank in ranks)

    def stored(self, shown: Sequence[int]) -> tuple[Any, ...]:
        """The answer as columns.

        Args:
            shown: Numbers of the responses, from left to right.

        Returns:
            Verdict, places in the order in which the responses are stored, grade, comment, and the order shown.
        """
        ranks = None
        if self.ranks is not None:
            by_number = dict(zip(shown, self.ranks, strict=True))
            ranks = json.dumps([by_number[number] for number in range(len(shown))])
        return self.verdict, ranks, self.grade, self.comment, json.dumps(list(shown))

    @classmethod
    def read(cls, row: Any, shown: Sequence[int]) -> Answer:
        """Reads columns of these names.

        Args:
            row: Of the database.
            shown: Numbers of the responses, from left to right.

        Returns:
            The answer, its places as they were shown.
        """
        ranks = None if row["ranks"] is None else json.loads(row["ranks"])
        places = None if ranks is None else tuple(ranks[number] for number in shown)
        return cls(row["verdict"], places, row["grade"], row["comment"])


@dataclass(frozen=True, slots=True)
class Given:
    """A task that an annotator has been given.

    Attributes:
        task: Its number.
        prompt: A string or chat messages.
        responses: As they are shown, from left to right.
        shown: Their numbers in the database.
        previous: What the annotator had answered, and took back.
    """

    task: int
    prompt: Any
    responses: tuple[str, ...]
    shown: tuple[int, ...]
    previous: Answer | None = None
