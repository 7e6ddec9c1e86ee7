"""Dense rewards over text: a score for every sentence or step, on the token that completes it."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_rlhf.dotted import imported
from lightning_rlhf.rewards.functions import Reward, own_name, parameters_of, plain
from lightning_rlhf.rewards.stored import StoredReward

Span = tuple[int, int]
"""Where a part of a text begins and ends, in characters, the end not included."""

Split = Literal["sentences", "lines"] | Callable[[str], Sequence[Span]] | str
"""How a text is taken apart: by name, or by a function to spans, or its dotted name."""

_LINE = re.compile(r"\S(?:.*\S)?")
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|(?=\s*$))", flags=re.MULTILINE)  # noqa: RUF001


def lines(text: str) -> list[Span]:
    r"""The lines of a text that hold anything, without the space around them.

    Args:
        text: Any.

    Returns:
        Where each is.

    Example:
        >>> lines("2 + 2 = 4\n\nSo 4. ")
        [(0, 9), (11, 16)]
    """
    return [match.span() for match in _LINE.finditer(text)]


def sentences(text: str) -> list[Span]:
    r"""The sentences of a text, each with the punctuation that ends it; a line's end ends a sentence too.

    A full stop ends one if space or a line's end follows, so that 3.14 is whole and "e.g. this" is not: for more give
    :class:`DenseReward` a ``split`` of your own.

    Args:
        text: Any.

    Returns:
        Where each is.

    Example:
        >>> [("One. Two?\nthree")[a:b] for a, b in sentences("One. Two?\nthree")]
        ['One.', 'Two?', 'three']
    """
    return [match.span() for match in _SENTENCE.finditer(text)]


SPLITS: dict[str, Callable[[str], list[Span]]] = {"lines": lines, "sentences": sentences}
"""How a text may be taken apart, by name."""


def split_of(split: Split) -> Callable[[str], Sequence[Span]]:
    """What takes texts apart.

    Args:
        split: Its name, itself, or its dotted name.

    Returns:
        A function from a text to spans.

    Raises:
        ValueError: If a name names none.
        TypeError: If it is none.
    """
    if isinstance(split, str) and "." not in split and split not in SPLITS:
        raise ValueError(
            f"`split={split!r}` must be 'sentences', 'lines', or a function from a text to (begin, end) pairs."
        )
    function = SPLITS.get(split) or imported(split, "split") if isinstance(split, str) else split
    if not callable(function):
        raise TypeError(f"`split={split!r}` must be callable, or the dotted name of a function.")
    return function


def token_scores(
    response: str, tokens: Tensor | Sequence[int], tokenizer: Any, spans: Sequence[Span], scores: Sequence[float]
) -> list[float]:
    """Puts the score of every part of a response on the token that completes it.

    That is the first token after which all characters of the part are there: a token that ends one part and begins the
    next bears the score of the first, the last of several tokens that make one character together bears that
    character's, and scores that meet on one token add up.

    Args:
        response: As it was decoded, without special tokens.
        tokens: (response,), as they were sampled, the ending EOS included.
        tokenizer: That decodes them.
        spans: Where each part is in the response.
        scores: One for each part.

    Returns:
        A number for every token, 0 for most.

    Raises:
        ValueError: If the tokens are not those of the response, a span does not lie within it, or scores and spans
            differ in number.
    """
    ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)

    def written(t: int) -> int:
        """Characters of the response that are complete after token t; half a character is decoded as another one."""
        return len(os.path.commonprefix([tokenizer.decode(ids[: t + 1], skip_special_tokens=True), response]))

    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if decoded != response:
        raise ValueError(
            f"`tokens` decode to {decoded!r}, and the response is {response!r}: give those that were sampled, and the "
            "tokenizer of the policy that wrote them."
        )
    if len(scores) != len(spans):
        raise ValueError(f"`scores` must be one for each of {len(spans)} parts of {response!r}, and are {len(scores)}.")
    result = [0.0] * len(ids)
    for (begin, end), score in zip(spans, scores, strict=True):
        if not 0 <= begin < end <= len(response):
            raise ValueError(
                f"`spans` holds {(begin, end)}, which is no part of the response {response!r}: a part begins before it "
                f"ends, in characters from 0 to {len(response)}."
            )
        result[bisect_left(range(len(ids)), end, key=written)] += float(score)
    return result


class DenseReward(StoredReward):
    """A reward that scores every sentence, line or step of a response.

    Args:
        score: Gets ``prompts`` and ``segments``, a list of strings per response, and by keyword whatever else of the
            prompts' rows it names (all of it, if it takes ``**kwargs``). Returns a list per response, one number for
            each of its segments; None for a response to which it does not apply. Or its dotted name.
        split: What a segment is: ``"sentences"``, ``"lines"``, or a function from a text to (begin, end) pairs, in
            characters, or its dotted name.

    Example:
        >>> def short(prompts, segments):
        ...     return [[-float(len(segment)) for segment in row] for row in segments]
        >>> DenseReward(short, split="lines").name
        'short'
    """

    def __init__(self, score: Reward | str, split: Split = "sentences") -> None:
        self._given = {"score": score, "split": split}
        self.score = imported(score, "score") if isinstance(score, str) else score
        self.split = split_of(split)
        if not callable(self.score):
            raise TypeError(f"`score={score!r}` must be callable, or the dotted name of a function.")
        self.name = own_name(self.score)
        self._named, self._takes_all = parameters_of(self.score)

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        response_tokens: Sequence[Tensor],
        tokenizer: Any,
        **metadata: Any,
    ) -> list[list[float] | None]:
        """Scores responses, token by token.

        Args:
            prompts: Strings or chat messages.
            responses: What was written to them.
            response_tokens: As it was sampled.
            tokenizer: Of the policy.
            **metadata: What else the prompts' rows hold.

        Returns:
            A number per token each, or None.

        Raises:
            ValueError: If what the function returned does not fit; the response is named.
        """
        spans = [[(int(a), int(b)) for a, b in self.split(response)] for response in responses]
        segments = [[text[a:b] for a, b in parts] for text, parts in zip(responses, spans, strict=True)]
        offered = {**metadata, "response_tokens": response_tokens, "tokenizer": tokenizer, "responses": responses}
        taken = {key: value for key, value in offered.items() if self._takes_all or key in self._named}
        scores = plain(self.score(prompts, segments, **taken))
        if not isinstance(scores, list | tuple) or len(scores) != len(responses):
            raise ValueError(f"it returned {scores!r}: it must return a list for each of {len(responses)} responses")
        result: list[list[float] | None] = []
        for i, (response, parts) in enumerate(zip(responses, spans, strict=True)):
            given = plain(scores[i])
            if given is None:
                result.append(None)
                continue
            if not isinstance(given, list | tuple) or len(given) != len(parts):
                raise ValueError(
                    f"it gave {given!r} for response {i} ({response!r}), which has {len(parts)} segments: it must give "
                    "one number for each"
                )
            result.append(token_scores(response, response_tokens[i], tokenizer, parts, given))
        return result
