"""The random-walk task of trlX: find the shortest way to the goal of a small directed graph, having seen random walks.

The numbers are those of `trlX's example
<https://github.com/CarperAI/trlx/blob/main/examples/randomwalks/randomwalks.py>`_, and so is the order in which they
are drawn, so that a seed stands for the same graph and the same walks. The task after which it was made is in the
`Decision Transformer <https://arxiv.org/abs/2106.01345>`_.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_rlhf.examples.letters import letter_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import GPT2Config, PreTrainedTokenizerFast

NODES = 21
MAX_NODES = 10  # of a walk, its start included
WALKS = 1000
EDGE_PROBABILITY = 0.1
GOAL = 0


class RandomWalks:
    """A directed graph of 21 nodes, the letters a to u, and 1,000 random walks on it that end at `a` or after 10 nodes.

    A walk is scored by how few nodes it took to the goal `a`, next to the shortest way from where it starts: 1 for a
    shortest walk, 0 for one that is no path of the graph or does not arrive. See :meth:`score`.

    Args:
        seed: Draws the graph, then the walks. The goal must be near enough from everywhere: of the seeds 0 to 59 about
            one in four is refused.
        adjacency: The graph, if it is not to be drawn: True where an edge leads from the row's node to the column's.
            Node 0 is the goal and has an edge to itself alone; every node has an edge.

    Attributes:
        letters: The names of the nodes, in order.
        adjacency: The graph, `(nodes, nodes)`, the goal's edge to itself included.
        walks: The random walks, such as `"fbca"`.
        prompts: The letters that a walk may start from: all but the goal, in order.
        shortest: The nodes on a shortest path from each letter to the goal, both ends counted.

    Raises:
        ValueError: If a shortest path has 10 nodes or more, or there is none.

    Example:
        >>> task = RandomWalks(seed=1000)
        >>> task.walks[0], task.shortest["s"]
        ('sda', 3)
        >>> task.score(["s", "s", "s"], ["da", "", "a"])  # a shortest walk, one that stays, and one through a wall
        [1.0, 0.0, 0.0]
    """

    def __init__(self, seed: int = 1000, adjacency: NDArray[np.bool_] | None = None) -> None:
        random_state = np.random.RandomState(seed)
        self.seed = seed
        self.adjacency = draw_graph(random_state) if adjacency is None else np.asarray(adjacency, dtype=bool)
        self.letters = ascii_lowercase[: len(self.adjacency)]
        self.prompts = [letter for node, letter in enumerate(self.letters) if node != GOAL]

        lengths = shortest_lengths(self.adjacency)
        far = [letter for node, letter in enumerate(self.letters) if lengths.get(node, MAX_NODES) >= MAX_NODES]
        if far:
            source = f"`seed={seed}` draws a graph" if adjacency is None else "`adjacency` is a graph"
            raise ValueError(
                f"{source} in which the goal is not within {MAX_NODES - 1} nodes of {', '.join(far)}: take another."
            )
        self.shortest = {self.letters[node]: length for node, length in lengths.items()}
        self.walks = ["".join(self.letters[node] for node in walk) for walk in draw_walks(self.adjacency, random_state)]

    def score(self, prompts: Sequence[str], responses: Sequence[str], **metadata: Any) -> list[float]:
        r"""Scores the walks `prompt + response`: :math:`(10 - L) / (10 - L^*)`, the reward of the task.

        :math:`L` is the place of the first `a`, counted from 1, if every step up to it is an edge, and else 10;
        :math:`L^*` is that of the shortest walk from the same start. What follows the first `a` is not looked at.

        Args:
            prompts: The letter that each walk starts with.
            responses: The letters that it goes on with.
            **metadata: Not used; a reward function is given more than the texts.

        Returns:
            A number from 0 to 1 for each walk.
        """
        walks = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return [(MAX_NODES - self._length(walk)) / (MAX_NODES - self.shortest[walk[0]]) for walk in walks]

    def valid(self, walk: str) -> bool:
        """Says whether every step of a walk, up to the first `a`, is an edge of the graph."""
        nodes = [self.letters.find(letter) for letter in walk[: walk.find(self.letters[GOAL]) + 1 or None]]
        return min(nodes) >= 0 and all(self.adjacency[step] for step in pairwise(nodes))

    def random_walk_mean(self) -> float:
        """Computes what the walks' scores are on average, exactly: each start once, each edge with the same chance.

        Returns:
            The mean over starts of the expected score of a random walk of at most 10 nodes.
        """
        transition = self.adjacency / self.adjacency.sum(1, keepdims=True)  # (nodes, nodes)
        best = np.array([self.shortest[letter] for letter in self.prompts])
        at = np.eye(len(self.letters))[1:]  # (starts, nodes): where the walks are that have not arrived
        mean = 0.0
        for length in range(2, MAX_NODES):
            at = at @ transition
            mean += float((at[:, GOAL] * (MAX_NODES - length) / (MAX_NODES - best)).mean())
            at[:, GOAL] = 0.0
        return mean

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Builds a tokenizer with one token for each node, and `<eos>` and `<pad>`; text and nodes are one to one."""
        return letter_tokenizer(self.letters)

    def config(self) -> GPT2Config:
        """Describes trlX's network for this task: a GPT-2 with 6 layers of width 144, of 1.7 M parameters."""
        from transformers import GPT2Config

        eos, pad = len(self.letters), len(self.letters) + 1
        return GPT2Config(
            vocab_size=pad + 1, n_layer=6, n_embd=144, n_head=12, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad
        )

    def _length(self, walk: str) -> int:
        goal = walk.find(self.letters[GOAL])
        return goal + 1 if 0 <= goal < MAX_NODES and self.valid(walk) else MAX_NODES


def draw_graph(random_state: np.random.RandomState) -> NDArray[np.bool_]:
    """Draws graphs until every node has an edge, then takes the goal's edges away but for one to itself.

    Args:
        random_state: Where chance comes from.

    Returns:
        The adjacency matrix, `(nodes, nodes)`.
    """
    while True:
        adjacency: NDArray[np.bool_] = random_state.rand(NODES, NODES) > 1 - EDGE_PROBABILITY
        np.fill_diagonal(adjacency, False)
        if adjacency.any(1).all():
            break
    adjacency[GOAL] = False
    adjacency[GOAL, GOAL] = True
    return adjacency


def draw_walks(adjacency: NDArray[np.bool_], random_state: np.random.RandomState) -> list[list[int]]:
    """Walks at random from random nodes, until the goal is reached or the walk has 10 nodes.

    Args:
        adjacency: The graph, `(nodes, nodes)`.
        random_state: Where chance comes from.

    Returns:
        The nodes of each walk, its start first.
    """
    walks = []
    for _ in range(WALKS):
        walk = [GOAL]
        while walk[0] == GOAL:
            walk[0] = random_state.randint(len(adjacency))
        while len(walk) < MAX_NODES and walk[-1] != GOAL:
            walk.append(int(random_state.choice(np.flatnonzero(adjacency[walk[-1]]))))
        walks.append(walk)
    return walks


def shortest_lengths(adjacency: NDArray[np.bool_]) -> dict[int, int]:
    """Counts the nodes on the shortest path from each node to the goal, by breadth-first search from the goal.

    Args:
        adjacency: The graph, `(nodes, nodes)`.

    Returns:
        The number for each node from which the goal can be reached, both ends counted: 1 for the goal itself.
    """
    lengths = {GOAL: 1}
    queue = deque([GOAL])
    while queue:
        there = queue.popleft()
        for here in np.flatnonzero(adjacency[:, there]).tolist():
            if here not in lengths:
                lengths[here] = lengths[there] + 1
                queue.append(here)
    return lengths
