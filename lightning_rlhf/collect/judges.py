"""Models that compare responses in place of people."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_rlhf.collect.answers import Answer
from lightning_rlhf.collect.store import Store
from lightning_rlhf.data.formats import is_chat
from lightning_rlhf.rewards.model import RewardModel

Comparison = tuple[Any, Sequence[str]]
"""A prompt, and responses to it."""


class Judge(ABC):
    """Says which responses are better.

    Attributes:
        name: Under which its answers are kept.
    """

    name: str

    @abstractmethod
    def answers(self, comparisons: Sequence[Comparison]) -> Iterator[Answer]:
        """Judges.

        Args:
            comparisons: Prompts with their responses.

        Yields:
            One answer after the other.
        """


class RewardJudge(Judge):
    """A reward model: what scores higher is better.

    Args:
        model: A folder or name, of :class:`RewardModule` or of any sequence classifier, which goes to a GPU if there is
            one; or a :class:`RewardModel`.
        tie_within: Responses tie whose scores differ by no more than this.
        name: Under which its answers are kept; by default the reward model's.
    """

    def __init__(self, model: str | RewardModel, tie_within: float = 0.0, name: str | None = None) -> None:
        if not tie_within >= 0:
            raise ValueError(f"`tie_within={tie_within}` must not be negative.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model if isinstance(model, RewardModel) else RewardModel(model, device=device)
        self.tie_within = tie_within
        self.name = name or self.model.name

    def answers(self, comparisons: Sequence[Comparison]) -> Iterator[Answer]:
        """Scores all responses at once, but for those to strings and to chat messages, which no batch may mix.

        A task with a score that is no number is skipped, and its scores are in the comment.
        """
        scores: list[list[float]] = [[] for _ in comparisons]
        for kind in (False, True):
            numbers = [number for number, (prompt, _) in enumerate(comparisons) if is_chat(prompt) is kind]
            rows = [(number, response) for number in numbers for response in comparisons[number][1]]
            if not rows:
                continue
            found = self.model([comparisons[number][0] for number, _ in rows], [response for _, response in rows])
            for (number, _), score in zip(rows, found, strict=True):
                scores[number].append(score)
        for own in scores:
            comment = "scores " + ", ".join(f"{score:.4g}" for score in own)
            if all(map(math.isfinite, own)):
                yield Answer("preference", tuple(places(own, self.tie_within)), comment=comment)
            else:
                yield Answer("skip", comment=comment)


def places(scores: Sequence[float], tie_within: float = 0.0) -> list[int]:
    """The places of scores, 1 for the highest.

    Args:
        scores: One a response.
        tie_within: A score that is no further than this below the one before it shares its place.

    Returns:
        A place for each.

    Example:
        >>> places([0.1, 2.0, 1.9], tie_within=0.2)
        [2, 1, 1]
    """
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    found = [1] * len(scores)
    for before, number in zip(order, order[1:], strict=False):
        found[number] = found[before] + (scores[before] - scores[number] > tie_within)
    return found


def judge_all(store: Store, judge: Judge, batch_size: int = 32) -> int:
    """Has a judge answer every task that it has not answered; each answer is kept as soon as it is there.

    Args:
        store: Of tasks and answers.
        judge: That answers.
        batch_size: Tasks that it gets at once.

    Returns:
        How many tasks were answered.

    Raises:
        ValueError: If a judge cannot answer, with the number of the task. A second call goes on from there.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
    store.join(judge.name, is_judge=True)
    numbers = store.unanswered(judge.name)
    done = 0
    for start in range(0, len(numbers), batch_size):
        chunk = numbers[start : start + batch_size]
        answers = judge.answers([store.task(number) for number in chunk])
        for number in chunk:
            try:
                answer = next(answers)
            except Exception as error:
                later = f" (or on a later one, up to {chunk[-1]}: it got them at once)" if number < chunk[-1] else ""
                raise ValueError(
                    f"the judge {judge.name!r} failed on task {number}, {done} of {len(numbers)} are answered: {error}"
                    f"{later}"
                ) from error
            store.judge(judge.name, number, answer)
            done += 1
    return done
