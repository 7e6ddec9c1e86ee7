"""What a model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(slots=True)
class DecoderOutput:
    """What a model says about the positions that were asked for.

    Attributes:
        logits: As the model gives them, soft caps and all.
        states: What its language-modelling head read.
        cache: Keys and values so far, or None where the model keeps none.
        trunk: What the lowest block that trains read, at all positions; on a first reading behind what an encoder made
            of the prompt, where there is one. None where nothing is kept.
    """

    logits: Float[Tensor, "batch positions vocabulary"]
    states: Float[Tensor, "batch positions width"]
    cache: Any = None
    trunk: Float[Tensor, "batch new trunk"] | None = None


@dataclass(slots=True)
class Said:
    """What a model says of tokens; in the shape of a reading's targets.

    Attributes:
        logprobs: Of the tokens.
        entropy: Of the distributions that they were drawn from, in nats.
        states: That predict them.
    """

    logprobs: Float[Tensor, ...]
    entropy: Float[Tensor, ...]
    states: Float[Tensor, "... width"]


def same_logits(logits: Tensor, expected: Tensor, spread: float | None = None) -> bool:
    """Whether logits or log-probs differ by rounding only.

    Args:
        logits: Of one way to call a model.
        expected: Of another.
        spread: What differences are measured against; by default the standard deviation of what is expected.

    Returns:
        Whether the shapes are equal, and the differences small.
    """
    tolerance = 1e-3 if torch.finfo(expected.dtype).bits >= 32 else 0.1
    if logits.shape != expected.shape:
        return False
    logits, expected = logits.float(), expected.float()
    return bool((logits - expected).abs().max() <= tolerance * (expected.std() if spread is None else spread))
