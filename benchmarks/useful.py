"""The useful work of an iteration in floating-point operations: what no implementation can do without.

Counted are the matrix products of the blocks over real tokens, causal attention, and the vocabulary head where a logit
is needed, two operations for every multiplication and three times the forward pass for a training step. A value or
reward head of one number is not counted, a second network for it is. Every response reads its own prompt, also where
some responses share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.sizes import Size
from benchmarks.workload import Case

Rows = Sequence[tuple[int, int]]
"""Tokens of prompt and response of every row."""

PHASES = ("generate", "score", "optimise")


def blocks(size: Size, rows: Rows) -> float:
    """Operations of a forward pass through all blocks, for as many tokens as predict the responses.

    Args:
        size: Of the network.
        rows: What is read; the last token of a response is not.

    Returns:
        In GFLOP.
    """
    total = 0
    for prompt, response in rows:
        tokens = prompt + response - 1
        attention = (
            4 * size.attention_width * size.layers * tokens * (tokens + 1) // 2
        )  # queries by keys, weights by values
        total += 2 * size.block_parameters * tokens + attention
    return total / 1e9


def head(size: Size, rows: Rows) -> float:
    """Operations of the vocabulary head over the responses.

    Args:
        size: Of the network.
        rows: What is written.

    Returns:
        In GFLOP.
    """
    return 2 * size.width * size.vocabulary * sum(response for _, response in rows) / 1e9


def work(case: Case, system: str, rows: Rows) -> dict[str, float]:
    """Operations of an iteration.

    Args:
        case: What is done.
        system: By whom: TRL's PPO has networks of their own for the value and for the reward.
        rows: What was read and written in it.

    Returns:
        GFLOP by phase; 0 for a phase that the row has not.
    """
    body, top = blocks(case.network, rows), head(case.network, rows)
    if case.row == "generate":
        return dict(zip(PHASES, (body + top, 0.0, 0.0), strict=True))
    if case.row.startswith("sft"):
        return dict(zip(PHASES, (0.0, 0.0, 3 * (body + top)), strict=True))
    if case.row == "reward":  # read at the last token too, which predicts nothing
        return dict(zip(PHASES, (0.0, 0.0, 3 * blocks(case.network, [(p, r + 1) for p, r in rows])), strict=True))
    has_reference = case.row == "ppo"
    if system == "trl" and case.row == "ppo":
        score, optimise = body + top + 2 * body, 3 * (body + top + body)
    elif case.num_layers_unfrozen >= 0:
        # The trunk runs once, when it writes; through a frozen head flows a gradient, but it has none itself.
        body_that_trains = body * case.num_layers_unfrozen / case.network.layers
        score, optimise = body_that_trains + top, 3 * body_that_trains + 2 * top
    else:
        score, optimise = body + top, 3 * (body + top)
    return dict(zip(PHASES, (body + top, score * has_reference, case.epochs * optimise), strict=True))
