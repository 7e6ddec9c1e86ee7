"""How long a row may be, and what becomes of a longer one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_rlhf.data.tokens import Tokenized

TooLong = Literal["error", "drop"]
Side = Literal["left", "right"]
SIDES: dict[str, tuple[str, ...]] = {"prompt": ("left", "right"), "response": ("right",)}
"""What may be cut of which part: a response whose beginning is missing would not follow from its prompt."""
ARGUMENTS = {"prompt": "max_prompt_length", "response": "max_response_length", "row": "max_length"}
"""The limits of prompts, responses, and both together, in the order in which they are looked at."""


@dataclass(frozen=True, slots=True)
class Excess:
    """What of a row is too long.

    Attributes:
        part: The prompt, the response, or the row.
        length: In tokens.
        limit: What it may have.
        is_own: Whether that was asked for; else it is what the model has room for.
    """

    part: str
    length: int
    limit: int
    is_own: bool

    def __str__(self) -> str:
        of = f" of {self.part}" if self.part == "response" or (self.is_own and self.part == "prompt") else ""
        bound = f"`{ARGUMENTS[self.part]}={self.limit}` allows no more"
        if not self.is_own:
            bound = f"the model has room for {self.limit}"
        return (
            f"has {self.length} tokens{of}, and {bound}: shorten it or leave it out, as `too_long='drop'` does, or let "
            "it be cut, by `truncate`."
        )


@dataclass(frozen=True)
class Limits:
    """How many tokens a row may have.

    Args:
        own: Those asked for, of ``"prompt"``, ``"response"`` and ``"row"``; None is no limit.
        too_long: What becomes of a longer row.
        truncate: Which parts are cut to fit before that, and on which side.
    """

    own: Mapping[str, int | None]
    too_long: TooLong = "error"
    truncate: Mapping[str, Side] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, limit in self.own.items():
            if limit is not None and limit < 1:
                raise ValueError(f"`{ARGUMENTS[part]}={limit}` must be at least 1, or None for no limit.")
        if self.too_long not in ("error", "drop"):
            raise ValueError(f"`too_long={self.too_long!r}` must be 'error' or 'drop'.")
        for part, side in self.truncate.items():
            if side not in SIDES.get(part, ()):
                raise ValueError(
                    f"`truncate={dict(self.truncate)!r}` must say 'left' or 'right' of 'prompt', and 'right' of "
                    "'response'."
                )

    def __str__(self) -> str:
        asked_for = [f"`{ARGUMENTS[part]}={limit}`" for part, limit in self.own.items() if limit is not None]
        return ", ".join(asked_for) or "none but what the model has room for"

    def fit(
        self, item: Tokenized, room: Mapping[str, int | None], ends: tuple[int | None, int | None] = (None, None)
    ) -> tuple[Tokenized, tuple[str, ...], Excess | None]:
        """Cuts what may be cut.

        Args:
            item: A row.
            room: What the model has room for, part by part.
            ends: Special tokens that a prompt which is cut keeps, if it has them: the first and the last.

        Returns:
            The row, which parts of it were cut, and what of it is still too long.
        """
        bounds = {part: self._bound(part, room) for part in ARGUMENTS}
        prompt, responses = item.prompt, item.responses
        prompt = self._cut_prompt(prompt, bounds["prompt"], ends)
        responses = self._cut_responses(responses, bounds["response"])
        whole = bounds["row"]
        if whole is not None:
            prompt = self._cut_prompt(prompt, max(1, whole - _longest(responses)), ends)
            responses = self._cut_responses(responses, whole - len(prompt))
        cut = tuple(
            part
            for part, is_cut in (("prompt", prompt is not item.prompt), ("response", responses is not item.responses))
            if is_cut
        )
        if cut:
            learnt = None if item.learnt is None else item.learnt[: len(responses[0])]
            item = item._replace(prompt=prompt, responses=responses, learnt=learnt)
        lengths = {"prompt": len(prompt), "response": item.longest, "row": len(prompt) + item.longest}
        for part, limit in bounds.items():
            if limit is not None and lengths[part] > limit:
                return item, cut, Excess(part, lengths[part], limit, limit == self.own.get(part))
        return item, cut, None

    def _bound(self, part: str, room: Mapping[str, int | None]) -> int | None:
        return min((n for n in (self.own.get(part), room.get(part)) if n is not None), default=None)

    def _cut_prompt(self, prompt: list[int], limit: int | None, ends: tuple[int | None, int | None]) -> list[int]:
        side = self.truncate.get("prompt")
        if side is None or limit is None or len(prompt) <= limit:
            return prompt
        first = prompt[:1] if prompt[0] == ends[0] else []
        last = prompt[-1:] if prompt[-1] == ends[1] else []
        room = limit - len(first) - len(last)
        if room < 1:
            return prompt
        middle = prompt[len(first) : len(prompt) - len(last)]
        return [*first, *(middle[-room:] if side == "left" else middle[:room]), *last]

    def _cut_responses(self, responses: list[list[int]], limit: int | None) -> list[list[int]]:
        if "response" not in self.truncate or limit is None or limit < 1 or _longest(responses) <= limit:
            return responses
        cut = [response[:limit] for response in responses]
        # Of responses that differ further on, none can be told to be the better one.
        return cut if len(set(map(tuple, cut))) == len(set(map(tuple, responses))) else responses


def _longest(responses: list[list[int]]) -> int:
    return max(map(len, responses), default=0)
