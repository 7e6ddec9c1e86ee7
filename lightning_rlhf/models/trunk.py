"""The frozen lower blocks of a decoder, whose work is done once per rollout and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rlhf.models.blocks import swapped


class Trunk:
    """Where a decoder begins to train, and how to begin there.

    In the list of blocks the frozen ones are swapped for stand-ins, the first of which returns the states that were
    kept; then the model's own forward runs, with its own masks, positions, final norm and head. Where later blocks
    need what the first one returns beside its states (T5's makes the position bias of all), it runs all the same, on a
    single row if that is alike for all.

    Args:
        frozen: Names of the blocks below, in order; none where only an encoder is frozen.
        branch: Name of the lowest block that trains.
        trains: Whether the blocks below train all the same, and this is only where a branch leaves them.
    """

    def __init__(self, frozen: tuple[str, ...], branch: str, trains: bool = False) -> None:
        self.frozen = frozen
        self.branch = branch
        self.forms: dict[str, tuple[type, int]] = {}  # what each frozen block returns, and how long it is
        self.more: list[int] = []  # rows of what the first one returned beside its states
        self.needs_more = False  # whether later blocks need it
        self.trains = trains

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Listens for what the lowest block that trains reads.

        Args:
            model: The decoder's.

        Yields:
            A list, to which every forward pass adds its states.
        """
        seen: list[Tensor] = []

        def read(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_states(args, kwargs))

        handle = model.get_submodule(self.branch).register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def learning_forms(self, model: nn.Module) -> Iterator[None]:
        """Looks in what form the frozen blocks return their states: alone, or first in a tuple or list.

        Args:
            model: The decoder's.
        """

        def learn(name: str, output: Any) -> None:
            self.forms[name] = (type(output), 1 if isinstance(output, Tensor) else len(output))
            if name == self.frozen[0] and not isinstance(output, Tensor):
                self.more = [len(values) for values in output[1:] if isinstance(values, Tensor)]

        handles = [
            model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: learn(name, output))
            for name in self.frozen
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def replaced(self, model: nn.Module, states: Tensor) -> AbstractContextManager[None]:
        """Lets a forward pass begin with kept states.

        Args:
            model: The decoder's.
            states: What :meth:`watched` saw, any rows and columns of it.

        Returns:
            A context in which the pass is made.
        """
        beside: list[Any] = []
        standins = {name: _StandIn(*self.forms[name], beside) for name in self.frozen}
        for name in self.frozen[:1]:
            standins[name].kept = states.contiguous()
            if self.needs_more:
                standins[name].block = (model.get_submodule(name),)
                standins[name].trains = self.trains
                standins[name].rows = 1 if all(rows == 1 for rows in self.more) else len(states)
        return swapped(model, standins)


class _StandIn(nn.Module):
    """Hands on what it gets, or states that were kept, in the form in which a block returns them."""

    def __init__(self, form: Any, length: int, beside: list[Any]) -> None:
        super().__init__()
        self.form = form
        self.length = length
        self.beside = beside  # what the first block returns beside its states, for all that stand in
        self.kept: Tensor | None = None
        self.block: tuple[nn.Module] | None = None  # in a tuple, so that it is no child
        self.rows = 0  # on which it runs
        self.trains = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = _states(args, kwargs)
        if self.block is not None:
            with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
                some = [_first(value, self.rows, len(states)) for value in args]
                more = {name: _first(value, self.rows, len(states)) for name, value in kwargs.items()}
                self.beside[:] = self.block[0](*some, **more)[1:]
        states = states if self.kept is None else self.kept
        if issubclass(self.form, Tensor):
            return states
        return self.form([states, *(self.beside or [None] * (self.length - 1))])


def _first(value: Any, rows: int, batch: int) -> Any:
    return value[:rows] if isinstance(value, Tensor) and len(value) == batch else value


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
