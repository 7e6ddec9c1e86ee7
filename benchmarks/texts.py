"""Prompts, examples and pairs of random words, the same for every system."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.sizes import Size

WORDS = 3
"""The first token that is a word; the others are special."""


def prompts(size: Size, count: int, seed: int = 0) -> list[str]:
    """Prompts of random words, as many as the size says, uniform.

    Args:
        size: Of the network.
        count: How many.
        seed: The same seed gives the same prompts, and a larger count goes on with them.

    Returns:
        The prompts.
    """
    draw = random.Random(f"prompts {seed}")
    return [_text(draw, size, size.prompt_tokens) for _ in range(count)]


def examples(size: Size, count: int, seed: int = 0, length: int = 0) -> list[dict[str, str]]:
    """Such prompts, and responses of random tokens, EOS included, to imitate.

    Args:
        size: Of the network.
        count: How many.
        seed: The same seed gives the same examples, and a larger count goes on with them.
        length: Tokens of prompt and response together, unless it is 0.

    Returns:
        Dicts of ``prompt`` and ``response``; the EOS is left for the systems to put there.
    """
    draw = random.Random(f"examples {seed}")
    rows = []
    for _ in range(count):
        prompt = _text(draw, size, size.prompt_tokens)
        lowest, highest = [length - prompt.count(" ") - 1] * 2 if length else size.example_tokens
        rows.append({"prompt": prompt, "response": _text(draw, size, (lowest - 1, highest - 1))})
    return rows


def pairs(size: Size, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Such prompts, and two such responses to each, of which one is said to be better.

    Args:
        size: Of the network.
        count: How many.
        seed: The same seed gives the same pairs, and a larger count goes on with them.

    Returns:
        Dicts of ``prompt``, ``chosen`` and ``rejected``; the EOS is left for the systems to put there.
    """
    draw = random.Random(f"pairs {seed}")
    lowest, highest = size.example_tokens
    lengths = {"prompt": size.prompt_tokens, "chosen": (lowest - 1, highest - 1), "rejected": (lowest - 1, highest - 1)}
    return [{key: _text(draw, size, tokens) for key, tokens in lengths.items()} for _ in range(count)]


def _text(draw: random.Random, size: Size, tokens: tuple[int, int]) -> str:
    return " ".join(f"w{draw.randrange(WORDS, size.vocabulary)}" for _ in range(draw.randint(*tokens)))
