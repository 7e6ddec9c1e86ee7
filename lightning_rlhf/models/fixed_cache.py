"""Keys and values that stay where they are, so that a step of decoding can be recorded once and played again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lightning_rlhf.models.cache import RoomyLayer


class FixedLayer(DynamicLayer):
    """A layer that writes new columns where a tensor says, and returns all columns that are in use, filled or not.

    Args:
        layer: Whose columns it begins with.
        at: (1,), the column that is written.
        columns: That there is room for.

    Attributes:
        rooms: Keys and values, (batch, heads, columns, width).
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, at: Tensor, columns: int) -> None:
        super().__init__()
        self.__dict__.update(
            {name: value for name, value in vars(layer).items() if name not in ("keys", "values", "_rooms")}
        )
        self.at = at
        # Zeros: what attention does not look at is multiplied by 0, which makes no number of what is none.
        self.rooms = tuple(
            held.new_zeros(*held.shape[:2], columns, held.shape[-1]) for held in (layer.keys, layer.values)
        )

    def fill(self, layer: DynamicLayer) -> None:
        """Takes over what another layer holds.

        Args:
            layer: Of as many rows.
        """
        for room, held in zip(self.rooms, (layer.keys, layer.values), strict=True):
            room[:, :, : held.shape[2]] = held
            room[:, :, held.shape[2] :] = 0  # what an earlier text has left may be no number

    def use(self, rows: int, columns: int) -> None:
        """Says which part is in use.

        Args:
            rows: The first so many.
            columns: Likewise.
        """
        self.keys, self.values = (room[:rows, :, :columns] for room in self.rooms)

    def select(self, index: Tensor, columns: int) -> None:
        """Moves rows to the front.

        Args:
            index: (rows,), which.
            columns: That are filled.
        """
        for room in self.rooms:
            room[: len(index), :, :columns] = room[:, :, :columns].index_select(0, index)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes a column.

        Args:
            key_states: (batch, heads, 1, width).
            value_states: (batch, heads, 1, width).
            *args: Ignored, as in transformers.
            **kwargs: Ignored, as in transformers.

        Returns:
            All columns in use.
        """
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Tokens before the one that is read: a tensor, since it is another number at every step."""
        return self.at[0]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Columns that attention sees, and the first of them."""
        return self.keys.shape[2], 0


class FixedCache:
    """A cache of transformers whose layers are fixed, and what a step needs beside it.

    Args:
        cache: After the prompt was read.
        mask: (batch, prompt), True where a token is real.
        columns: Tokens of prompt and response that there is room for.
        added: Of a mask that attention adds to its logits, as where a model spells it out; None of one that says yes
            or no.

    Attributes:
        tokens: (batch, 1), what is read.
        positions: (batch, 1), of it.
        seen: (batch, 1, 1, columns), where attention looks.
        filled: How many columns there are tokens in.
    """

    def __init__(self, cache: Any, mask: Tensor, columns: int, added: torch.dtype | None = None) -> None:
        batch, device = len(mask), mask.device
        self.columns = columns
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens, self.positions = (torch.zeros(batch, 1, dtype=torch.long, device=device) for _ in range(2))
        self.yes: bool | float = True if added is None else 0.0
        self.no: bool | float = False if added is None else torch.finfo(added).min
        self.seen = torch.full((batch, 1, 1, columns), self.no, dtype=added or torch.bool, device=device)
        self.layers = [FixedLayer(layer, self.at, columns) for layer in cache.layers]
        self.cache = copy.copy(cache)
        self.cache.layers = self.layers
        self.filled = 0

    @staticmethod
    def can_hold(cache: Any) -> bool:
        """Whether all layers of a cache keep all that they have read, and nothing else.

        Args:
            cache: After the prompt was read.

        Returns:
            The answer.
        """
        layers = getattr(cache, "layers", [])
        return bool(layers) and all(type(layer) is RoomyLayer for layer in layers)

    def fits(self, cache: Any, mask: Tensor, columns: int) -> bool:
        """Whether another cache can be filled in.

        Args:
            cache: After its prompt was read.
            mask: (batch, prompt), of the prompt.
            columns: That are needed.

        Returns:
            The answer.
        """
        if len(mask) != len(self.tokens) or columns > self.columns or len(cache.layers) != len(self.layers):
            return False
        return all(
            room.dtype == held.dtype
            and room.device == held.device
            and (room.shape[:2], room.shape[3]) == (held.shape[:2], held.shape[3])
            for mine, its in zip(self.layers, cache.layers, strict=True)
            for room, held in zip(mine.rooms, (its.keys, its.values), strict=True)
        )

    def fill(self, cache: Any, mask: Tensor) -> None:
        """Takes over a prompt that was read.

        Args:
            cache: That holds it.
            mask: (batch, prompt), True where a token is real.
        """
        self.filled = mask.shape[1]
        for mine, its in zip(self.layers, cache.layers, strict=True):
            mine.fill(its)
        self.seen.fill_(self.no)
        self.seen[:, 0, 0, : self.filled].masked_fill_(mask, self.yes)
        self.positions.copy_(mask.sum(1, keepdim=True) - 1)
        self.at.fill_(self.filled - 1)

    def select(self, index: Tensor) -> None:
        """Keeps some rows, which are the first ones from then on.

        Args:
            index: (rows,), which.
        """
        for layer in self.layers:
            layer.select(index, self.filled)
        for held in (self.positions, self.seen):
            held[: len(index)] = held.index_select(0, index)

    def advance(self, tokens: Tensor) -> None:
        """Makes ready to read a token more of the first rows.

        Args:
            tokens: (rows, 1), which.
        """
        self.tokens[: len(tokens)] = tokens
        self.positions += 1
        self.at += 1
        self.seen.index_fill_(3, self.at, self.yes)
        self.filled += 1

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(room.numel() * room.element_size() for layer in self.layers for room in layer.rooms)
