"""What the YAMLs of this example name: networks, tokenizer, reward, metric and data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_rlhf import ConversationDataModule, PromptDataModule
from lightning_rlhf.examples.seq2seq.task import Sorting
from lightning_rlhf.examples.seq2seq.training import EPISODES, ITERATIONS

if TYPE_CHECKING:
    from transformers import BartConfig, PreTrainedTokenizerFast, T5Config


@functools.cache
def task() -> Sorting:
    """The words, dealt once."""
    return Sorting()


def t5() -> T5Config | BartConfig:
    """A T5, not trained yet."""
    return task().config("t5")


def bart() -> T5Config | BartConfig:
    """A BART, not trained yet."""
    return task().config("bart")


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter."""
    return task().tokenizer()


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward of the task: the share of places in which the response is the sorted word.

    Args:
        prompts: Words.
        responses: What was written.

    Returns:
        A number from 0 to 1 each.
    """
    return task().score(prompts, responses)


def measure(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, list[float]]:
    """What validation reports beside the reward: which words were sorted without a slip.

    Args:
        prompts: Words.
        responses: What was written.

    Returns:
        0 or 1 for each, by name.
    """
    return {"sorted": [float(score == 1.0) for score in task().score(prompts, responses)]}


class Demonstrations(ConversationDataModule):
    """Words that were sorted with slips.

    Args:
        batch_size: Rows of a batch.
    """

    def __init__(self, batch_size: int = 100) -> None:
        super().__init__(task().demonstrations, batch_size=batch_size)


class Words(PromptDataModule):
    """Words to learn from, none twice, and those that are held out.

    Args:
        iterations: How often episodes are collected.
        batch_size: Words of an iteration.
    """

    def __init__(self, iterations: int = ITERATIONS, batch_size: int = EPISODES) -> None:
        words, held_out = task().prompts[: iterations * batch_size], task().held_out
        super().__init__(
            words, validation=held_out, test=held_out, predict=held_out, batch_size=batch_size, shuffle=False
        )
