"""How a run is spread over devices, and in what types it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_rlhf.strategies.fsdp2 import NAME
from lightning_rlhf.strategies.sharding import PRECISIONS

Spread = Literal["one", "ddp", "sharded"]
_PRECISIONS = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
_MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_SHORT = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Placement:
    """Devices, strategy and precision of a Trainer.

    Attributes:
        devices: How many processes with a device each.
        spread: Whether there is one, each holds everything (DDP), or each a part (FSDP2).
        precision: As Lightning writes it, such as ``"bf16-mixed"``.
        is_gpu: Whether the devices are GPUs.
        accumulates: Batches of an automatic optimizer step.
        holds_weights: Whether a sharded policy is whole on every device while it writes.
    """

    devices: int = 1
    spread: Spread = "one"
    precision: str = "32-true"
    is_gpu: bool = True
    accumulates: int = 1
    holds_weights: bool = True

    @classmethod
    def of(cls, trainer: Mapping[str, Any], devices: int | None = None) -> Placement:
        """What the ``trainer`` section of a configuration says.

        Args:
            trainer: The section.
            devices: How many there are instead, on all machines together.

        Returns:
            The placement.

        Raises:
            ValueError: If modules cannot be trained so, or it is not said how many devices there are.
        """
        devices = _devices(trainer) if devices is None else devices
        if devices < 1:
            raise ValueError(f"`devices={devices}` must be at least 1.")
        precision = str(trainer.get("precision"))
        precision = _SHORT.get(precision, precision)
        spread = _spread(trainer.get("strategy"), devices)
        known = PRECISIONS if spread == "sharded" else {"32-true": None, **_PRECISIONS, **_MIXED}
        if precision not in known:
            raise ValueError(
                f"`trainer.precision={precision!r}` is none that can be planned with "
                f"`trainer.strategy={_name(trainer.get('strategy'))!r}`: use {' or '.join(map(repr, known))}."
            )
        is_gpu = trainer.get("accelerator") not in ("cpu",)
        accumulates = int(trainer.get("accumulate_grad_batches") or 1)
        return cls(devices, spread, precision, is_gpu, accumulates, _holds_weights(trainer.get("strategy")))

    @property
    def is_sharded(self) -> bool:
        """Whether every device holds a part of each weight."""
        return self.spread == "sharded"

    def held(self, dtype: torch.dtype) -> torch.dtype:
        """In what type a network's numbers are held.

        Args:
            dtype: In which it was loaded.

        Returns:
            The type; a whole number's is its own.
        """
        return _PRECISIONS.get(self.precision, dtype) if dtype.is_floating_point else dtype

    def exchanged(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """In what types devices put together what each has a part of.

        Args:
            dtype: Of the parts.

        Returns:
            That of whole weights, in which their gradients are made, and that in which all devices add these up.
        """
        policy = PRECISIONS[self.precision] if self.is_sharded else MixedPrecisionPolicy()
        return policy.param_dtype or dtype, policy.reduce_dtype or dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """As Lightning lets a mixed precision compute."""
        dtype = _MIXED.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False)

    def part(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of what the first device holds of a tensor: the largest part of its first dimension.

        Args:
            shape: Of the whole.

        Returns:
            A shape.
        """
        shape = tuple(shape)
        return (-(-shape[0] // self.devices), *shape[1:]) if self.is_sharded and shape else shape

    def bytes_of(self, tensors: Iterable[Tensor], rounded: Mapping[int, int] | None = None) -> int:
        """Memory that parameters take on a device.

        Args:
            tensors: Of a network; what is there twice counts once.
            rounded: Bytes of those that are held in fewer bits, by ``id``.

        Returns:
            The bytes.
        """
        rounded = rounded or {}
        unique = {id(tensor): tensor for tensor in tensors}
        return sum(
            rounded.get(number, torch.Size(self.part(tensor.shape)).numel() * self.held(tensor.dtype).itemsize)
            for number, tensor in unique.items()
        )


def _devices(trainer: Mapping[str, Any]) -> int:
    devices, nodes = trainer.get("devices"), int(trainer.get("num_nodes") or 1)
    if isinstance(devices, list):
        return len(devices) * nodes
    try:
        count = int(str(devices))
    except (TypeError, ValueError):
        count = -1
    if count < 1:
        raise ValueError(f"`trainer.devices={devices!r}` does not say how many there are: pass `--devices`.")
    return count * nodes


def _spread(strategy: Any, devices: int) -> Spread:
    name = _name(strategy)
    if name.startswith("fsdp") or name == "FSDPStrategy":
        raise ValueError(
            f"`trainer.strategy={name!r}` is FSDP1, which cannot train these modules: use {NAME!r}, which is FSDP2."
        )
    if name in (NAME, "RLHFStrategy", "ModelParallelStrategy"):
        return "sharded"
    if name.startswith("ddp") or name == "DDPStrategy":
        return "ddp"
    if name in ("auto", "SingleDeviceStrategy"):
        return "one" if devices == 1 else "ddp"
    raise ValueError(f"`trainer.strategy={name!r}` cannot be planned: use 'auto', 'ddp' or {NAME!r}.")


def _holds_weights(strategy: Any) -> bool:
    """Whether a strategy gathers the policy for a whole rollout, which is what it does unless it is told."""
    if not hasattr(strategy, "get"):
        return bool(getattr(strategy, "hold_weights", True))
    return bool((strategy.get("init_args") or {}).get("hold_weights", True))


def _name(strategy: Any) -> str:
    """Of a strategy: as it is called, or the class of one that is named by its path."""
    if strategy is None:
        return "auto"
    path = strategy.get("class_path") if hasattr(strategy, "get") else None
    return strategy if isinstance(strategy, str) else str(path or type(strategy).__name__).rpartition(".")[2]
