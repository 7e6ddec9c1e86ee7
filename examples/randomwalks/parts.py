"""What the YAMLs of this example name: its policy, reward, metric and data, on the graph that the example shows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_rlhf import ConversationDataModule, PromptDataModule
from lightning_rlhf.examples.randomwalks.task import RandomWalks

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast

GRAPH = 1000


@functools.cache
def task(seed: int = GRAPH) -> RandomWalks:
    """The graph of a seed, drawn once."""
    return RandomWalks(seed)


def config() -> GPT2Config:
    """The policy's network, not trained yet."""
    return task().config()


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a node."""
    return task().tokenizer()


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward of the task: 1 for a shortest walk, 0 for one that does not arrive.

    Args:
        prompts: Where each walk starts.
        responses: How it goes on.

    Returns:
        A number from 0 to 1 each.
    """
    return task().score(prompts, responses)


def measure(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, list[float]]:
    """What validation reports beside the reward: which walks are paths of the graph, and which are shortest.

    Args:
        prompts: Where each walk starts.
        responses: How it goes on.

    Returns:
        0 or 1 for each walk, by name.
    """
    walks = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return {
        "valid": [float(task().valid(walk)) for walk in walks],
        "shortest": [float(score == 1.0) for score in task().score(prompts, responses)],
    }


class Walks(ConversationDataModule):
    """The random walks to imitate.

    Args:
        graph_seed: Which graph.
        batch_size: Walks of a batch.
    """

    def __init__(self, graph_seed: int = GRAPH, batch_size: int = 25) -> None:
        walks = [{"prompt": walk[0], "response": walk[1:]} for walk in task(graph_seed).walks]
        super().__init__(walks, validation=walks[:100], batch_size=batch_size)


class Starts(PromptDataModule):
    """The letters that walks start from: all in turn to learn from, and once each to validate, test and predict.

    Args:
        iterations: How often episodes are collected.
        prompts: Starts of an iteration.
        graph_seed: Which graph.
    """

    def __init__(self, iterations: int = 46, prompts: int = 60, graph_seed: int = GRAPH) -> None:
        starts = task(graph_seed).prompts
        needed = iterations * prompts
        rows = (starts * (needed // len(starts) + 1))[:needed]
        super().__init__(rows, validation=starts, test=starts, predict=starts, batch_size=prompts, shuffle=False)
