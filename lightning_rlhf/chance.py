"""Random numbers that are a function of what they are for, not of who drew before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Stream = Literal["rollout", "evaluate", "generate", "minibatches", "noise", "shuffle", "bins", "build"]
"""What random numbers are for; two streams have nothing in common."""


def run_seed(seed: int | None) -> int:
    """A seed as given, or what ``seed_everything`` set, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def row_uniforms(
    seed: int, stream: Stream, counters: Sequence[int], rows: Sequence[int], length: int
) -> Float[Tensor, "batch length"]:
    """Uniform numbers in [0, 1) for every row, each a function of (seed, stream, counters, row) alone.

    One process and two draw the same numbers for the same row, and nothing needs to be saved.

    Args:
        seed: Of the run.
        stream: What they are for.
        counters: Such as the iteration.
        rows: The global number of each row.
        length: How many numbers a row gets.

    Returns:
        The numbers, in single precision, on the CPU.
    """
    key = _key(seed, stream, counters)
    uniforms = np.empty((len(rows), length), dtype=np.float32)
    for i, row in enumerate(rows):
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row]))
        generator.random(out=uniforms[i], dtype=np.float32)
    return torch.from_numpy(uniforms)


def derived_seed(seed: int, stream: Stream, *counters: int) -> int:
    """A seed for a generator with a state of its own.

    Args:
        seed: Of the run.
        stream: What it is for.
        counters: Such as iteration, update, micro-batch and rank.

    Returns:
        63 bits.
    """
    return int(_key(seed, stream, counters)[0] >> np.uint64(1))


def _key(seed: int, stream: Stream, counters: Sequence[int]) -> np.ndarray:
    """128 bits of a hash, as Philox takes them."""
    digest = hashlib.blake2b(repr((int(seed), stream, tuple(map(int, counters)))).encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64)
