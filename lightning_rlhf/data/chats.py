"""Conversations in tokens, and which of these the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning_rlhf.models.texts import end_id, templated

ASSISTANT = "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_ids(messages: Sequence[Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are learnt: every turn of the assistant with the EOS that ends it.

    What the assistant wrote is what the chat template marks by ``{% generation %}``, and with a template that has no
    marks what a turn adds to the conversation before it.

    Args:
        messages: The conversation.
        tokenizer: That has a chat template.

    Returns:
        The tokens, and True where one is learnt.

    Raises:
        ValueError: If the assistant says nothing, or what it says cannot be found.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        raise ValueError("`messages` has no message of the assistant, from which something could be learnt.")
    if turns[0] == 0:
        raise ValueError("`messages` begins with the assistant: give it something to answer.")
    has_marks = tokenizer.chat_template is not None and _MARKS.search(tokenizer.get_chat_template()) is not None
    ids, learnt = (_marked if has_marks else _added)(messages, turns, tokenizer)
    if not any(learnt):
        raise ValueError(
            "`messages`: nothing that the assistant says has a token, from which something could be learnt."
        )
    return _with_ends(ids, learnt, end_id(tokenizer))


def _marked(messages: Sequence[Any], turns: list[int], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """By the template's marks."""
    found = templated(messages, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    ids, learnt = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    begun = sum(now and not before for before, now in zip([False, *learnt], learnt, strict=False))
    if begun < len(turns):
        raise ValueError(
            f"`messages`: the chat template marks {begun} turns of the assistant, and there are {len(turns)}: put "
            "`{% generation %}` around each, without white space at its beginning."
        )
    return ids, learnt


def _added(messages: Sequence[Any], turns: list[int], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """By what each turn adds."""
    ids = list(templated(messages, tokenizer))
    learnt = [False] * len(ids)
    for turn in turns:
        begin = templated(messages[:turn], tokenizer, add_generation_prompt=True)
        end = templated(messages[: turn + 1], tokenizer)
        for part in (begin, end):
            if ids[: len(part)] != part:
                raise ValueError(
                    f"`messages[{turn}]`: the chat template writes what comes before it in another way when more "
                    "follows, so that what the assistant wrote cannot be told: mark it in the template, by "
                    "`{% generation %}` and `{% endgeneration %}`."
                )
        learnt[len(begin) : len(end)] = [True] * (len(end) - len(begin))
    return ids, learnt


def _with_ends(ids: list[int], learnt: list[bool], end: int) -> tuple[list[int], list[bool]]:
    """Lets every turn end with its first EOS, also where the template leaves it out of its marks; the last has one."""
    exact = list(learnt)
    is_over = False
    for t in range(1, len(ids)):
        if learnt[t] and not learnt[t - 1]:
            is_over = False
        if exact[t]:
            exact[t] = not is_over
            is_over = is_over or ids[t] == end
        elif learnt[t - 1] and not is_over and ids[t] == end:
            exact[t] = is_over = True
    last = max(t for t, is_learnt in enumerate(exact) if is_learnt)
    ids, exact = ids[: last + 1], exact[: last + 1]
    return (ids, exact) if ids[-1] == end else ([*ids, end], [*exact, True])
