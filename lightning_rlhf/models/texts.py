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
            f"`prompt={prompt!r}` must be a string, or a list of chat messages with the keys 'role' and 'content'."
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
