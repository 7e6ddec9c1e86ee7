"""What a process reward model reads, and where its scores go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_rlhf.models.classifier import Classifier, Row
from lightning_rlhf.models.texts import prompt_ids, step_ends, step_ids
from lightning_rlhf.rewards.dense import Span, token_scores
from lightning_rlhf.rewards.texts import TextReader

ENDS = "ends"
"""What a row has beside its tokens: which of them end a step, counted from the last, which is -1."""


class StepReader(TextReader):
    """Makes tokens of prompts and responses that are scored step by step.

    Args:
        tokenizer: Of the reward model.
        export: How it is to be read, from its config: the ``separator`` behind every step, None where nothing is; and
            the ``layer`` that reads the state at every token.
        split: Takes a response apart; by default the separator does.
        name: Of the reward model, for errors.
    """

    def __init__(
        self,
        tokenizer: Any,
        export: Mapping[str, Any],
        split: Callable[[str], Sequence[Span]] | None,
        name: str,
    ) -> None:
        super().__init__(tokenizer, "steps", False, name)
        self.separator: str | None = export["separator"]
        self.layer: str = export["layer"]
        if split is None and self.separator is None:
            raise ValueError(
                f"`split=None` must be given to the reward model {name!r}, which learnt from data that said where "
                "steps end: pass 'sentences', 'lines', or a function to (begin, end) pairs."
            )
        self.split = split

    def spans(self, response: str) -> list[Span]:
        """Where the steps of a response are.

        Args:
            response: What was written.

        Returns:
            Each, in characters.
        """
        if self.split is not None:
            return [(int(begin), int(end)) for begin, end in self.split(response)]
        ends = step_ends(response, str(self.separator))
        return list(zip([0, *ends], ends, strict=False))

    def rows(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        tokens: Sequence[Tensor] | None = None,
        policy: Any = None,
    ) -> list[Row]:
        """Tokens of every text, as long as they are, and where its steps end.

        Args:
            prompts: Strings or chat messages.
            responses: What follows them.
            tokens: Of the responses.
            policy: The tokenizer that decoded them.

        Returns:
            A row each.

        Raises:
            ValueError: If it is not known how the policy wrote them.
        """
        if tokens is None or policy is None:
            raise ValueError(
                f"`response_tokens` and `tokenizer` must be given to the reward model {self.name!r}, which scores "
                "steps: its scores lie on the policy's tokens."
            )
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            ends = [end for _, end in self.spans(response)]
            ids, last = step_ids(response, ends, self.separator, self.tokenizer)
            first = prompt_ids(prompt, self.tokenizer)
            rows.append({"input_ids": first + ids, ENDS: [number - len(ids) for number in last]})
        return rows

    def end_of(self, row: Row, limit: int) -> Row:
        """The last tokens of a row, and the steps that end among them."""
        ids = super().end_of({"input_ids": row["input_ids"]}, limit)
        return {**ids, ENDS: [end for end in row[ENDS] if -end <= len(ids["input_ids"])]}

    def logits(self, classifier: Classifier, rows: Sequence[Row]) -> list[Tensor]:
        """The logits at the ends of steps, (steps, labels) each, in one forward pass."""
        logits = classifier.token_logits(rows, self.layer)
        return [of_row[row[ENDS]] for of_row, row in zip(logits, rows, strict=True)]

    def answers(
        self, scores: Sequence[list[float]], responses: Sequence[str], tokens: Sequence[Tensor] | None, policy: Any
    ) -> list[Any]:
        """A number for every token of each response: the score of a step on the token that completes it."""
        dense = []
        for text, of_steps, ids in zip(responses, scores, tokens or (), strict=True):
            spans = self.spans(text)
            unread = [0.0] * (len(spans) - len(of_steps))  # what ended before the text that was left
            dense.append(token_scores(text, ids, policy, spans, unread + of_steps))
        return dense


def reader_of(
    export: Mapping[str, Any], tokenizer: Any, reads: str | None, append_eos: bool, split: Any, name: str
) -> TextReader:
    """What makes tokens for a reward model.

    Args:
        export: What its config says of how it is to be read.
        tokenizer: Of the reward model.
        reads: What it reads; by default what its config says, else the prompt and then the response.
        append_eos: Whether every text ends with EOS.
        split: Takes a response apart, for one that scores steps.
        name: Of the reward model, for errors.

    Returns:
        The reader.

    Raises:
        ValueError: If one that scores steps is to read something else, or one that scores responses is to split them.
    """
    if export.get("reads") == "steps":
        if reads is not None or append_eos:
            raise ValueError(
                f"`reads={reads!r}` and `append_eos={append_eos}`: the reward model {name!r} scores steps, and its "
                "export says how they are read. Leave them out."
            )
        return StepReader(tokenizer, export, split, name)
    if split is not None:
        raise ValueError(
            f"`split={split!r}`: the reward model {name!r} scores whole responses: leave it out, or pass an export of "
            "ProcessRewardModule."
        )
    return TextReader(tokenizer, reads or export.get("reads", "both"), append_eos, name)
