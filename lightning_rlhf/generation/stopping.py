"""Where a response ends before its EOS."""

from __future__ import annotations

from typing import Any


def stop_criteria(tokenizer: Any, stop: tuple[str, ...]) -> Any:
    """Makes what finds stop strings on token ids, wherever in a token they begin or end.

    Args:
        tokenizer: Of the policy.
        stop: The strings.

    Returns:
        Transformers' ``StopStringCriteria``: from (batch, response) tokens to which rows just completed one.

    Raises:
        ValueError: If the tokenizer cannot write any text, which the criteria need.
    """
    from transformers import StopStringCriteria

    try:
        return StopStringCriteria(tokenizer, list(stop))
    except Exception as error:
        raise ValueError(
            f"`stop={list(stop)}` needs a tokenizer that can write any text, and this one cannot: {error}. "
            "Leave `stop` empty, or use another tokenizer."
        ) from error
