"""Rewards that a checkpoint can name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class StoredReward(ABC):
    """A reward that says what it was made of, so that a checkpoint holds plain values and makes the same again."""

    @abstractmethod
    def plain(self) -> dict[str, Any] | None:
        """What makes the same again, as plain values; None where there is an object or the class cannot be imported."""
