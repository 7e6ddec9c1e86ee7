"""What rows with preferences say, in any of the forms in which public data sets have them."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.data.fields import Fields
from lightning_rlhf.data.formats import Row

PAIR: tuple[str, ...] = ("prompt", "chosen", "rejected")
RANKING: tuple[str, ...] = ("prompt", "responses", "ranks", "scores")
SUMMARIES: tuple[str, ...] = ("info", "summaries", "choice")
"""What each of the forms of a row reads, beside what any may have; any other key is metadata."""

ANY = ("margin", "tie")

KEYS = tuple(dict.fromkeys((*PAIR, *ANY, *RANKING, *SUMMARIES)))
"""What a row's keys may be called."""

NEEDED = (
    "'prompt', 'chosen' and 'rejected'; 'prompt', 'responses' and 'ranks' or 'scores'; or 'info', 'summaries' and "
    "'choice'"
)
"""What a row must have."""

ASSISTANT = "\n\nAssistant:"
"""What a turn of the assistant begins with in a transcript."""

TEMPLATES = {
    "post": "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
    "article": "Article:\n\n{article}\n\nTL;DR:",
}
"""The prompts of `Learning to summarize from human feedback <https://arxiv.org/abs/2009.01325>`_, by what they hold."""

PARTS = ("subreddit", "title", *TEMPLATES)
"""What these are made of."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Responses to a prompt, and which were judged better.

    Attributes:
        prompt: A string or chat messages.
        responses: The best first.
        ranks: Their places, from 0; equal ones tie.
        margin: How much better the first of two was judged to be; 0 where nobody said.
        metadata: Every other key of the row.
        place: Where the row is from, for errors.
    """

    prompt: Any
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    margin: float
    metadata: Row
    place: str


def comparison(row: Row, place: str, columns: Mapping[str, str]) -> Comparison:
    """Reads a row.

    Args:
        row: With ``prompt``, ``chosen`` and ``rejected``; ``chosen`` and ``rejected`` alone, as transcripts or chat
            messages that begin alike; ``prompt``, ``responses`` and ``ranks`` or ``scores``; or ``info``, ``summaries``
            and ``choice``.
        place: Where it is from, for errors.
        columns: What the row's own names for these keys are, where they differ.

    Returns:
        What it says.

    Raises:
        ValueError: If it is none of these, with place, field and value.
    """
    fields = Fields(row, place, columns, KEYS)
    if fields.has("responses"):
        form, (prompt, responses, ranks) = RANKING, _ranking(fields)
    elif fields.has(*SUMMARIES):
        form, (prompt, responses, ranks) = SUMMARIES, _summaries(fields)
    elif fields.has("chosen", "rejected"):
        form, (prompt, responses, ranks) = PAIR, _pair(fields)
    else:
        raise fields.lacks(NEEDED)
    margin = fields.number("margin", fields.known.get("margin", 0.0))
    if margin < 0.0:
        raise fields.wrong("margin", "must not be negative: it says how much better the first response is")
    if margin and (len(ranks) > 2 or ranks[0] == ranks[1]):
        raise fields.wrong("margin", "needs two responses of which one is better: leave it out")
    if fields.flag("tie") and len(set(ranks)) > 1:
        raise fields.wrong("tie", "says that neither is better, and the row that one is: leave it out")
    return Comparison(prompt, tuple(responses), tuple(ranks), margin, fields.but(*form, *ANY), place)


def _pair(fields: Fields) -> tuple[Any, list[str], list[int]]:
    chosen, rejected = fields.known["chosen"], fields.known["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, responses = _texts(fields, fields.text("chosen"), fields.text("rejected"))
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise fields.wrong("rejected", "must be text where `chosen` is, and chat messages where that is")
    else:
        prompt, responses = _chats(fields)
    return prompt, responses, [0, 0] if fields.flag("tie") else [0, 1]


def _texts(fields: Fields, chosen: str, rejected: str) -> tuple[Any, list[str]]:
    """Two texts; without a prompt, what they have in common up to the assistant's last turn is the prompt."""
    if fields.has("prompt"):
        return fields.prompt(), [chosen, rejected]
    common = os.path.commonprefix([chosen, rejected])
    end = common.rfind(ASSISTANT)
    if end < 0:
        raise fields.wrong(
            "chosen",
            f"and `{fields.names['rejected']}` have no {ASSISTANT!r} in common, at which their prompt "
            "would end: give a `prompt`, or transcripts",
        )
    end += len(ASSISTANT)
    return chosen[:end], [chosen[end:], rejected[end:]]


def _chats(fields: Fields) -> tuple[Any, list[str]]:
    """Two conversations, the last message of each being the response, and those before it their prompt."""
    chosen, rejected = fields.messages("chosen"), fields.messages("rejected")
    before = chosen[:-1]
    if rejected[:-1] != before:
        raise fields.wrong("rejected", f"must begin as `{fields.names['chosen']}` does, and differ in its last message")
    for key, messages in {"chosen": chosen, "rejected": rejected}.items():
        if messages[-1]["role"] != "assistant":
            raise fields.wrong(key, "must end with a message of the assistant, which is the response")
    responses = [chosen[-1]["content"], rejected[-1]["content"]]
    if not before:
        return fields.prompt(), responses
    prompt = fields.known.get("prompt")
    if prompt is None or any(message["content"] == prompt for message in before):
        return before, responses
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else fields.messages("prompt")
    return before if before[: len(prompt)] == prompt else prompt + before, responses


def _ranking(fields: Fields) -> tuple[Any, list[str], list[int]]:
    responses = [fields.text("responses", response) for response in fields.items("responses")]
    if len(responses) < 2:
        raise fields.wrong("responses", "must be two responses or more")
    if fields.has("ranks") == fields.has("scores"):
        raise ValueError(
            f"{fields.place}: 'responses' go with either 'ranks' (1 for the best) or 'scores' (the higher)."
        )
    key, sign = ("ranks", 1.0) if fields.has("ranks") else ("scores", -1.0)
    numbers = [sign * fields.number(key, number) for number in fields.items(key)]
    if len(numbers) != len(responses):
        raise fields.wrong(key, f"must be {len(responses)} numbers, one for each response")
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    places = {number: place for place, number in enumerate(sorted(set(numbers)))}
    return fields.prompt(), [responses[i] for i in order], [places[numbers[i]] for i in order]


def _summaries(fields: Fields) -> tuple[Any, list[str], list[int]]:
    """A comparison of summaries as OpenAI published them."""
    summaries, info = fields.items("summaries"), fields.known["info"]
    found = [summary.get("text") if isinstance(summary, Mapping) else summary for summary in summaries]
    texts = [fields.text("summaries", text) for text in found if isinstance(text, str)]
    if not len(found) == len(texts) == 2:
        raise fields.wrong("summaries", "must be two, each with a 'text'")
    choice = fields.number("choice", fields.known["choice"])
    if choice not in (0.0, 1.0):
        raise fields.wrong("choice", "must be 0 or 1, the number of the better summary")
    present = {name: info[name] for name in PARTS if info.get(name) is not None} if isinstance(info, Mapping) else {}
    template = next((template for name, template in TEMPLATES.items() if name in present), None)
    if template is None or not all(isinstance(text, str) for text in present.values()):
        raise fields.wrong("info", "must have the text of a 'post' or an 'article'")
    prompt = fields.text("info", template.format(**{"subreddit": "", "title": "", **present}))
    better = int(choice)
    return prompt, [texts[better], texts[1 - better]], [0, 1]
