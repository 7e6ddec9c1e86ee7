"""Rewards by rule: what can be said of a response without a model."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from lightning_rlhf.rewards.stored import StoredReward

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Rule(StoredReward):
    """A reward without state, which can be pickled, stored in a checkpoint, and named in YAML."""

    name: ClassVar[str]  # under which it is logged

    @property
    def _given(self) -> dict[str, Any]:  # type: ignore[override]
        return asdict(self)


@dataclass(frozen=True)
class ExactMatch(Rule):
    r"""1 for a response that is a right answer, 0 for another.

    .. math:: r = \max_{a \in A} 1[\mathrm{normal}(\mathrm{extract}(y)) = \mathrm{normal}(a)]

    White space around an answer never counts, and within it one kind is as good as another.

    Args:
        key: Of the prompts' rows, under which the right answer lies, or a list of right answers A; where it is None
            the reward does not apply.
        extract: A regular expression whose last match in a response is its answer: its first group, if it has one. A
            response without a match is wrong. By default the whole response is the answer.
        ignore_case: Whether upper and lower case are the same.
        ignore_punctuation: Whether ASCII punctuation is taken out first, such as the comma of 1,000.

    Example:
        >>> rule = ExactMatch(extract=r"####\s*(.+)", ignore_punctuation=True)
        >>> rule(["How many?", "And now?"], ["600 + 400\n#### 1,000", "1000"], answer=["1000", "1000"])
        [1.0, 0.0]
    """

    name = "exact_match"

    key: str = "answer"
    extract: str | None = None
    ignore_case: bool = False
    ignore_punctuation: bool = False

    def __post_init__(self) -> None:
        """Refuses an expression that is none."""
        if self.extract is not None:
            check_pattern("extract", self.extract)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str], **metadata: Any) -> list[float | None]:
        """Scores responses.

        Args:
            prompts: Not read.
            responses: What was written.
            **metadata: What else the prompts' rows hold, a list each.

        Returns:
            1, 0 or None each.

        Raises:
            ValueError: If the rows have no such key.
        """
        if self.key not in metadata:
            known = sorted(set(metadata) - {"response_tokens", "tokenizer"})
            raise ValueError(f"`key={self.key!r}` must be a key of the prompts' rows, which have {known} beside them.")
        return [
            None if answers is None else float(self._is_right(response, answers))
            for response, answers in zip(responses, metadata[self.key], strict=True)
        ]

    def _is_right(self, response: str, answers: Any) -> bool:
        if self.extract is not None:
            found = list(re.finditer(self.extract, response))
            if not found:
                return False
            response = found[-1].group(1 if found[-1].re.groups else 0) or ""
        several = answers if isinstance(answers, list | tuple) else [answers]
        return self._normal(response) in {self._normal(str(answer)) for answer in several}

    def _normal(self, text: str) -> str:
        text = text.lower() if self.ignore_case else text
        text = text.translate(_PUNCTUATION) if self.ignore_punctuation else text
        return " ".join(text.split())


@dataclass(frozen=True)
class RegexMatch(Rule):
    r"""1 for a response that a regular expression matches, 0 for another.

    .. math:: r = 1[y \in L(p)]

    Args:
        pattern: The expression p, in Python's syntax; flags stand at its beginning, such as ``(?s)``.
        mode: ``"search"`` finds it anywhere, ``"fullmatch"`` wants the whole response.

    Example:
        >>> RegexMatch(r"\d+")(["a", "b"], ["It is 4.", "four"])
        [1.0, 0.0]
    """

    name = "regex"

    pattern: str
    mode: Literal["search", "fullmatch"] = "search"

    def __post_init__(self) -> None:
        """Refuses an expression that is none."""
        check_pattern("pattern", self.pattern)
        if self.mode not in ("search", "fullmatch"):
            raise ValueError(f"`mode={self.mode!r}` must be 'search' or 'fullmatch'.")

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """Scores responses.

        Args:
            prompts: Not read.
            responses: What was written.

        Returns:
            1 or 0 each.
        """
        match = getattr(re.compile(self.pattern), self.mode)
        return [float(match(response) is not None) for response in responses]


@dataclass(frozen=True)
class TagFormat(Rule):
    r"""1 for a response that consists of tagged parts in their order, each once and nothing beside them, 0 for another.

    .. math:: r = 1[y = \langle t_1 \rangle \dots \langle /t_1 \rangle \langle t_2 \rangle \dots \langle /t_2 \rangle]

    White space may surround the parts. The format reward of `DeepSeek-R1 <https://arxiv.org/abs/2501.12948>`_, section
    2.2.2.

    Args:
        tags: Names of the parts.
        opened: Whether the prompt ends with the first opening tag, as some chat templates do, so that a response begins
            behind it.

    Example:
        >>> TagFormat()(["a", "b"], ["<think>2 + 2</think> <answer>4</answer>", "<answer>4</answer>"])
        [1.0, 0.0]
    """

    name = "format"

    tags: Sequence[str] = ("think", "answer")
    opened: bool = False

    def __post_init__(self) -> None:
        """Refuses tags that cannot be told apart."""
        if isinstance(self.tags, str) or not self.tags or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"`tags={self.tags!r}` must be a list of one name or more, each once.")

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """Scores responses.

        Args:
            prompts: Not read.
            responses: What was written.

        Returns:
            1 or 0 each.
        """
        start = f"<{self.tags[0]}>" if self.opened else ""
        return [float(self._is_well_formed(start + response)) for response in responses]

    def _is_well_formed(self, text: str) -> bool:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(text.count(mark) != 1 for mark in marks):
            return False
        pattern = r"\s*".join(f"{re.escape(f'<{tag}>')}.*{re.escape(f'</{tag}>')}" for tag in self.tags)
        return re.fullmatch(rf"\s*{pattern}\s*", text, flags=re.DOTALL) is not None


def check_pattern(argument: str, pattern: str) -> None:
    """Refuses what is no regular expression.

    Args:
        argument: What the user calls it.
        pattern: The expression.

    Raises:
        ValueError: If it cannot be compiled.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"`{argument}={pattern!r}` must be a regular expression of Python's: {error}.") from error
