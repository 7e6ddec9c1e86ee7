"""From what users write to tokens: prompts, and responses that follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in prompt)
    )


def prompt_ids(prompt: Any, tokenizer: Any, has_encoder: bool = False) -> list[int]:
    """Tokens of a prompt, ready for a response to follow.

    Args:
        prompt: A string, which is tokenised with the special tokens that the tokenizer puts before a text; or chat
            messages, which go through its chat template.
        tokenizer: Of the policy.
        has_encoder: Whether an encoder reads the prompt, all of it, with what the tokenizer puts at its end as well.

    Returns:
        At least one token.

    Raises:
        ValueError: If the prompt is neither, or has no token.
    """
    if is_chat(prompt):
        return templated(prompt, tokenizer, add_generation_prompt=True)
    if not isinstance(prompt, str):
        raise ValueError(
            f"`prompt={prompt!r}` must be text, or a list of chat messages with the keys 'role' and 'content'."
        )
    ids = list(tokenizer(prompt)["input_ids"])
    if not has_encoder and ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text, and a prompt goes on
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ValueError(
            f"`prompt={prompt!r}` has no token, and the tokenizer no BOS token to begin with: a response needs "
            "something to follow."
        )
    return ids


def templated(messages: Sequence[Any], tokenizer: Any, return_dict: bool = False, **options: Any) -> Any:
    """Tokens of chat messages, as the chat template writes them.

    Args:
        messages: With the keys ``role`` and ``content``.
        tokenizer: That has the template.
        return_dict: Whether to return all that the tokenizer says.
        **options: Of ``apply_chat_template``.

    Returns:
        A list of ids, or a dict.

    Raises:
        ValueError: If there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "`prompt` is a list of chat messages, and the tokenizer has no chat template: set "
            "`tokenizer.chat_template`, or write the prompt as text."
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=return_dict, **options)
    except Exception as error:  # a template may raise whatever it likes
        raise ValueError(f"the chat template refuses the messages ({type(error).__name__}: {error}).") from error


def response_ids(response: str, tokenizer: Any, has_encoder: bool = False) -> list[int]:
    """Tokens of a response, the EOS that ends it included.

    Args:
        response: What is to be written.
        tokenizer: Of the policy.
        has_encoder: Whether an encoder read the prompt, as where a translator has one vocabulary for each language.

    Returns:
        The tokens.
    """
    text = {"text_target" if has_encoder else "text": response}
    return ended(tokenizer(**text, add_special_tokens=False)["input_ids"], tokenizer)


def ended(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Tokens with one EOS at their end, whether they had it or not."""
    end = end_id(tokenizer)
    return [*ids] if ids and ids[-1] == end else [*ids, end]


def end_id(tokenizer: Any) -> int:
    """What ends a text: EOS, or SEP where a tokenizer, such as BERT's, has none.

    Args:
        tokenizer: Any.

    Returns:
        The id.

    Raises:
        ValueError: If it has neither.
    """
    found = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)
    if found is None:
        raise ValueError("`tokenizer` has neither EOS nor SEP, so that no text could end: set `tokenizer.eos_token`.")
    return found


def step_ends(response: str, separator: str) -> list[int]:
    r"""Where the steps of a response end: before every separator that has something before it, and at the end.

    Args:
        response: What was written.
        separator: What stands between two steps.

    Returns:
        In characters. A separator belongs to no step; white space alone is none, and goes with what follows it.

    Example:
        >>> step_ends("2 + 2 = 4\n\nSo 4.", "\n")
        [9, 16]
    """
    ends, begin, place = [], 0, 0
    while place <= len(response):
        found = response.find(separator, place)
        end = len(response) if found < 0 else found
        if response[begin:end].strip():
            ends.append(end)
            begin = end + len(separator)
        place = end + len(separator)
    return ends


def step_ids(response: str, ends: Sequence[int], separator: str | None, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a response that is read step by step, up to the end of the last.

    Each step is tokenised by itself, so that it ends with a token.

    Args:
        response: What was written.
        ends: Where its steps end, in characters.
        separator: What stands behind every step, behind the last one too; None where nothing does.
        tokenizer: Of the reward model.

    Returns:
        The tokens, and which of them ends each step.

    Raises:
        ValueError: If the steps do not follow one another, or one has no token.
    """
    ids: list[int] = []
    last: list[int] = []
    begin = 0
    for end in ends:
        if not begin < end <= len(response):
            raise ValueError(
                f"`ends={list(ends)}` must rise from more than 0 to at most {len(response)}, the characters of the "
                "response."
            )
        step = response[begin:end]
        begin = end
        if separator is not None:
            step = step.removeprefix(separator) + separator
        found = tokenizer(step, add_special_tokens=False)["input_ids"]
        if not found:
            raise ValueError(f"the step {step!r} has no token: join it to another one.")
        ids += found
        last.append(len(ids) - 1)
    return ids, last
