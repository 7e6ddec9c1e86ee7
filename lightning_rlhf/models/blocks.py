"""The blocks of a decoder and what comes after them, found by watching a forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where a decoder can be cut.

    Attributes:
        blocks: Names of its blocks, in the order in which they run.
        after: Names of the outermost modules that run only once the last block has ended: final norm, head, and
            whatever a model has between them.
    """

    blocks: tuple[str, ...]
    after: tuple[str, ...]

    def top(self, count: int) -> tuple[str, ...]:
        """Names of the last blocks and of what comes after them.

        Args:
            count: How many blocks.

        Returns:
            The names.
        """
        return self.blocks[len(self.blocks) - count :] + self.after


def find_blocks(model: nn.Module, layers: int, run: Callable[[], Any], within: str = "") -> Blocks | None:
    """Watches a forward pass for the list of modules that are called one after the other, once each.

    Args:
        model: Whose pass it is.
        layers: How many blocks there are.
        run: Makes the pass.
        within: Name of the part of the model in which they lie.

    Returns:
        The blocks; None where no list of ``layers`` modules is called so.
    """
    began, ended = _times(model, run)
    candidates = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and name.startswith(within):
            names = tuple(f"{name}.{i}" for i in range(layers))
            starts = [time for block in names for time in began[block]]
            if len(starts) == layers and starts == sorted(starts) and all(len(began[block]) == 1 for block in names):
                candidates.append((sum(p.numel() for p in module.parameters()), names))
    if not candidates:
        return None
    _, blocks = max(candidates)  # a list inside of a block (of experts, say) may be as long, and is smaller
    last = ended[blocks[-1]][0]
    late = [name for name, times in began.items() if times and min(times) > last]
    return Blocks(blocks, tuple(name for name in late if not any(name.startswith(f"{other}.") for other in late)))


def find_stacks(model: nn.Module, run: Callable[[], Any]) -> tuple[str, ...]:
    """Watches a forward pass for lists of modules each of which is called once, whatever they are called.

    Args:
        model: Whose pass it is.
        run: Makes the pass.

    Returns:
        Names of the modules in the outermost of these lists: the blocks of an encoder, of a decoder, or of both.
    """
    began, _ = _times(model, run)
    stacks: list[str] = []
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{stack}.") for stack in stacks):
            names = [f"{name}.{i}" for i in range(len(module))]
            if all(len(began[block]) == 1 for block in names):
                stacks.append(name)
                blocks += names
    return tuple(blocks)


def _times(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """When, in a pass, the forward of every module began and ended."""
    began: dict[str, list[int]] = defaultdict(list)
    ended: dict[str, list[int]] = defaultdict(list)
    clock = iter(range(10**9))
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: began[name].append(next(clock))))
        handles.append(module.register_forward_hook(lambda *_, name=name: ended[name].append(next(clock))))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return began, ended


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts other modules in the place of some for a while. The forward that runs is the model's own.

    Args:
        model: Whose modules are swapped.
        modules: By the names of those that they stand in for.
    """
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in modules]
    originals = [parent._modules[child] for parent, child in places]
    for (parent, child), module in zip(places, modules.values(), strict=True):
        parent._modules[child] = module
    try:
        yield
    finally:
        for (parent, child), original in zip(places, originals, strict=True):
            parent._modules[child] = original


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """Calls a hook before a module's forward.

    Args:
        module: Any module.
        hook: As torch calls it.
    """
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def instead(module: nn.Module, forward: Any) -> Iterator[None]:
    """Lets a module do something else when it is called; its hooks, a shard's among them, run all the same.

    Args:
        module: Any module.
        forward: What it does.
    """
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
