"""Bytes that are alive while something runs on tensors that have no numbers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Adds up the storages that operators make, for as long as each of them lives.

    Within a ``FakeTensorMode`` every operator of forward and backward pass says what it would allocate, whatever the
    network, and autograd keeps what it would keep; nothing is computed.

    Args:
        label: What memory is for, where nothing else is said.

    Attributes:
        now: Bytes that are alive, by label.
        peak: What they were when all of them together were most.
    """

    def __init__(self, label: str) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._label = label
        self._known: dict[int, tuple[weakref.ref[Any], str]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves out what was there before.

        Args:
            tensors: Such as parameters.
        """
        for tensor in tensors:
            self._note(tensor, "")

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Says of a tensor that was seen, now that it is known, what it is for.

        Args:
            tensor: That is alive.
            label: What it is for.
        """
        storage = tensor.untyped_storage()
        _, before = self._known.get(storage._cdata, (None, ""))
        if before:
            self._forget(storage._cdata, storage.nbytes())
            self._note(tensor, label)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """For as long as it lasts, what is made is for something else.

        Args:
            label: What it is for.
        """
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, and notes what it returns."""
        output = func(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, Tensor) and value.layout is torch.strided:  # a sparse one's parts were seen
                self._note(value, self._label)
        return output

    def _note(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._known:
            return
        self._known[number] = (weakref.ref(storage, lambda _: self._forget(number, size)), label)
        if label:
            self.now[label] += size
            if self.now.total() > self.peak.total():
                self.peak = self.now.copy()

    def _forget(self, number: int, size: int) -> None:
        _, label = self._known.pop(number)
        if label:
            self.now[label] -= size
