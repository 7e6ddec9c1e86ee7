"""The rows of an embedding that is its model's head too, whose gradient is added to the head's where it is not 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_rlhf.models.blocks import instead


@contextmanager
def sparse_lookup(embedding: nn.Module, head: nn.Module) -> Iterator[Tensor | None]:
    """Lets a model look up its embeddings, on a CPU, with a gradient of the rows that it has read alone.

    An embedding's gradient is as large as the vocabulary and 0 but for some hundred rows. Where the head has the same
    weight, that has a gradient of all rows already, to which those rows are added.

    Args:
        embedding: Of the model.
        head: Of the model.

    Yields:
        The weight for the head to multiply by; None where the embedding is looked up as ever.
    """
    if not (
        isinstance(embedding, nn.Embedding) and type(embedding) is nn.Embedding and _can_be_sparse(embedding, head)
    ):
        yield None
        return
    of_head, of_rows = _Tied.apply(embedding.weight)

    def look_up(tokens: Tensor) -> Tensor:
        return _Lookup.apply(of_rows, tokens, embedding.padding_idx)

    with instead(embedding, look_up):
        yield of_head


def _can_be_sparse(embedding: nn.Embedding, head: nn.Module) -> bool:
    """Whether the weight is the head's too, and learns, on a CPU, as a plain tensor."""
    weight = embedding.weight
    learns = weight.requires_grad and torch.is_grad_enabled()
    return weight is getattr(head, "weight", None) and type(weight) is nn.Parameter and weight.is_cpu and learns


class _Tied(torch.autograd.Function):
    """A weight for the head and for the lookup, where their gradients meet: torch's own sum would be a copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_head: Tensor | None, of_rows: Tensor | None) -> Tensor | None:
        if of_head is None or of_rows is None:
            return of_head if of_rows is None else of_rows.to_dense()
        return of_head.index_add_(0, of_rows._indices()[0], of_rows._values())


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.padding = weight.shape, padding
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens = ctx.saved_tensors[0].flatten()
        rows = grad.reshape(len(tokens), -1)
        if ctx.padding is not None:
            rows = rows.masked_fill((tokens == ctx.padding)[:, None], 0.0)
        return torch.sparse_coo_tensor(tokens[None], rows, ctx.shape, check_invariants=False), None, None
