"""Prompts as a page shows them."""

from __future__ import annotations

import json
import re
from typing import Any, TypedDict

from lightning_rlhf.data.formats import is_chat

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Turn(TypedDict):
    """What somebody says; nobody is named where a prompt is plain text."""

    role: str | None
    content: str


def turns(prompt: Any) -> list[Turn]:
    r"""Takes a prompt apart.

    Args:
        prompt: Chat messages, a transcript as HH-RLHF has them, or any text.

    Returns:
        What each says. The empty turn at the end of a transcript, which the response fills, is left out.

    Example:
        >>> turns("\n\nHuman: Hi!\n\nAssistant:")
        [{'role': 'Human', 'content': 'Hi!'}]
        >>> turns("A text.\n")
        [{'role': None, 'content': 'A text.\n'}]
    """
    if is_chat(prompt):
        return [{"role": str(message["role"]), "content": _text(message["content"])} for message in prompt]
    transcript = prompt.lstrip("\n")
    if not transcript.startswith("Human:"):
        return [{"role": None, "content": prompt}]
    _, *parts = _SPEAKER.split(transcript)
    spoken: list[Turn] = [
        {"role": role, "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return spoken if spoken[-1]["content"] else spoken[:-1]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2)
