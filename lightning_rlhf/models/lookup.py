"""The rows of an embedding that is its model's head too, whose gradient is added to the head's where it is not 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_rlhf.functional.head import Learnt
from lightning_rlhf.models.blocks import instead


@contextmanager
def sparse_lookup(embedding: nn.Module, head: nn.Module) -> Iterator[Learnt | None]:
    """Lets a model look up its embeddings, on a CPU, with a gradient of the rows that it has read alone.

    An embedding's gradient is as large as the vocabulary and 0 but for some hundred rows. Where the head has the same
    weight, that has a gradient of all rows already, to which those rows are added.

    Args:
        embedding: Of the model.
        head: Of the model.

    Yields:
        What the head is to be told; None where the embedding is looked up as ever.
    """
    if not (
        isinstance(embedding, nn.Embedding) and type(embedding) is nn.Embedding and _can_be_sparse(embedding, head)
    ):
        yield None
        return
    weight, learnt = embedding.weight, Learnt()

    def look_up(tokens: Tensor) -> Tensor:
        return _Lookup.apply(weight, tokens, embedding.padding_idx, learnt)

    with instead(embedding, look_up):
        yield learnt


def _can_be_sparse(embedding: nn.Embedding, head: nn.Module) -> bool:
    """Whether the weight is the head's too, and learns, on a CPU, as a plain tensor."""
    weight = embedding.weight
    learns = weight.requires_grad and torch.is_grad_enabled()
    return weight is getattr(head, "weight", None) and type(weight) is nn.Parameter and weight.is_cpu and learns


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, padding: int | None, learnt: Learnt) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.padding, ctx.learnt = weight.shape, padding, learnt
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tokens = ctx.saved_tensors[0].flatten()
        rows = grad.reshape(len(tokens), -1)
        if ctx.padding is not None:
            rows = rows.masked_fill((tokens == ctx.padding)[:, None], 0.0)
        if ctx.learnt.head:
            ctx.learnt.head = False
            return torch.sparse_coo_tensor(tokens[None], rows, ctx.shape, check_invariants=False), None, None, None
        return rows.new_zeros(ctx.shape).index_add_(0, tokens, rows), None, None, None
