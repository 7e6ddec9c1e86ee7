"""Keys and values that are written into room that is already there, instead of being copied at every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

GROWTH = 64
"""Tokens for which there is room beyond those that need it, at least; half as many again where that is more."""


def columns_at(total: int) -> int:
    """Columns that are allocated when room is made for some.

    Args:
        total: That are needed.

    Returns:
        At least as many.
    """
    return total + max(GROWTH, total // 2)


def give_room(cache: Any) -> None:
    """Lets a cache grow in place.

    transformers' own layer makes a new tensor for every token, and copies all keys and values into it: on a CPU a third
    of the time of decoding.

    Args:
        cache: Of transformers; layers of other kinds than its plain dynamic one are left as they are.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # that of the prompt does not grow
    layers = getattr(cache, "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = RoomyLayer(layer)


class RoomyLayer(DynamicLayer):
    """A layer whose ``keys`` and ``values`` are the first columns of larger tensors.

    Args:
        layer: What it goes on from.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(vars(layer))
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new columns behind those that are there.

        Args:
            key_states: (batch, heads, new, width).
            value_states: (batch, heads, new, width).
            *args: Ignored, as in transformers.
            **kwargs: Ignored, as in transformers.

        Returns:
            All keys and values.
        """
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        length = held.shape[-2]
        total = length + new.shape[-2]
        room = self._rooms.get(name)
        # Whoever selects or repeats rows leaves a tensor of its own.
        if room is None or room.data_ptr() != held.data_ptr() or room.shape[-2] < total:
            room = torch.empty(
                *held.shape[:-2], columns_at(total), held.shape[-1], dtype=held.dtype, device=held.device
            )
            room[..., :length, :] = held
            self._rooms[name] = room
        room[..., length:total, :] = new
        return room[..., :total, :]
