"""The plan of an iteration's updates: who is in which minibatch, and what a token counts in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.batches import Experience
from lightning_rlhf.functional.averaging import Averaging, averaging_count, token_weights
from lightning_rlhf.models.reading import pieces
from lightning_rlhf.modules.ranks import gather_over_ranks, world_size


@dataclass(slots=True)
class Minibatch:
    """What one optimizer step learns from.

    Attributes:
        micro_batches: Its rows in pieces, with ``weights``; as many on every rank.
    """

    micro_batches: list[Experience]


class MinibatchPlan:
    """Epochs of shuffled minibatches whose weights no split can change.

    Every token's weight is divided by the count of its *global* minibatch, tokens or responses as ``averaging`` says,
    and multiplied by the number of ranks, over which gradients are averaged. Rows without a signal are in no
    micro-batch, but in that count, so that leaving them out changes no gradient. Making the plan is one collective.

    Args:
        experience: The rows of this rank.
        num_epochs: How often each row is learnt from.
        minibatch_size: Rows of a minibatch, per rank; the last one of an epoch may be smaller.
        micro_batch_size: Rows of a backward pass; a whole minibatch by default.
        micro_batch_tokens: Tokens of a backward pass instead, of prompts and responses.
        unpads: Whether the policy reads rows without their padding.
        averaging: What a loss is averaged over.
        length: The fixed length of ``averaging="length"``, in tokens.
        generator: Shuffles.
        rows_of_largest: Rows of the rank that has most.
    """

    def __init__(
        self,
        experience: Experience,
        *,
        num_epochs: int,
        minibatch_size: int,
        micro_batch_size: int | None,
        micro_batch_tokens: int | None = None,
        unpads: bool = False,
        averaging: Averaging,
        length: int,
        generator: torch.Generator,
        rows_of_largest: int,
    ) -> None:
        self.experience = experience
        mask = experience.sampled_mask
        self.weights = token_weights(mask, averaging, length)  # (batch, response)
        per_epoch = -(-rows_of_largest // minibatch_size)
        has_signal = experience.has_signal
        counts = averaging_count(mask, averaging).double()  # (batch,)
        self.pieces: list[list[Tensor]] = []  # (minibatch, micro-batch): rows
        mine: list[list[float]] = []  # (minibatch, 2): what its rows count, and micro-batches
        for _ in range(num_epochs):
            order = torch.randperm(len(experience), generator=generator).to(mask.device)
            for i in range(per_epoch):
                rows = order[i * minibatch_size : (i + 1) * minibatch_size]
                learnt_from = rows if has_signal is None else rows[has_signal[rows]]
                size = micro_batch_size or minibatch_size
                self.pieces.append(pieces(experience, learnt_from, unpads, size, micro_batch_tokens))
                mine.append([float(counts[rows].sum()), len(self.pieces[-1])])
        plans = gather_over_ranks(torch.tensor(mine, dtype=torch.float64, device=mask.device))  # (rank, minibatch, 2)
        self.counts = plans[..., 0].sum(0).clamp(min=1.0).tolist()
        # At least one: where no row has a signal, a step with gradient 0 is made all the same, so that momentum, weight
        # decay and schedule are those of a run that leaves nothing out.
        self.most_pieces = plans[..., 1].amax(0).long().clamp(min=1).tolist()

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[Minibatch]:
        for parts, count, most in zip(self.pieces, self.counts, self.most_pieces, strict=True):
            scale = world_size() / count
            micro_batches = [self._piece(rows, scale) for rows in parts]
            # A rank with less to do goes along with a row that counts nothing, so that no other waits for it.
            filler = torch.zeros(1, dtype=torch.long, device=self.weights.device)
            micro_batches += [self._piece(filler, 0.0) for _ in range(most - len(parts))]
            yield Minibatch(micro_batches)

    def _piece(self, rows: Tensor, scale: float) -> Experience:
        piece = self.experience.select(rows)
        piece.weights = self.weights[rows] * scale
        if piece.importance is not None:
            piece.weights = piece.weights * piece.importance
        return piece.trimmed()
