"""What the machine can do, and whether anybody else was using it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_TICKS = os.sysconf("SC_CLK_TCK")


SHAPES = ((2048, 2048, 2048), (4096, 512, 2048), (4096, 2048, 512), (2048, 512, 16384))
"""Rows, inner and outer size of the products that are timed: a cube, and what a block and a head of width 512 make."""

BACKENDS = {
    "MKL": lambda x, weight: torch.mm(x, weight.t()),
    "oneDNN": lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
}
"""Whose products are timed: those that torch calls by itself, on x86 MKL's, and those of oneDNN."""

GPU = "cuBLAS in bfloat16"
"""Whose are timed on a GPU."""


@dataclass(frozen=True)
class MatrixRate:
    """What a backend's matrix products reach, in single precision unless it says otherwise.

    Attributes:
        backend: A key of :data:`BACKENDS`.
        gflops: GFLOP a second, of the fastest.
        shape: Which that was.
    """

    backend: str
    gflops: float
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.backend} {self.gflops:.0f} GFLOP/s ({' x '.join(map(str, self.shape))})"


def matrix_rates(
    threads: int, repeats: int = 8, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> dict[str, MatrixRate]:
    """The best rates of matrix products in single precision.

    Args:
        threads: Of torch.
        repeats: Of every product, of which the fastest counts.
        shapes: Rows, inner and outer size of the products.

    Returns:
        By backend; oneDNN only where torch was built with it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates: dict[str, MatrixRate] = {}
    try:
        for backend, product in BACKENDS.items():
            if backend == "MKL" or torch.backends.mkldnn.is_available():
                timed = [MatrixRate(backend, _rate_of(product, shape, repeats), shape) for shape in shapes]
                rates[backend] = max(timed, key=lambda rate: rate.gflops)
    finally:
        torch.set_num_threads(before)
    return rates


def gpu_rates(repeats: int = 20, size: int = 8192) -> dict[str, MatrixRate]:
    """The rate of a large matrix product in bfloat16.

    Args:
        repeats: Products, of which the fastest counts.
        size: Of the cube.

    Returns:
        By backend.
    """
    x, weight = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    fastest = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(x, weight)
        torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return {GPU: MatrixRate(GPU, 2 * size**3 / fastest / 1e9, (size, size, size))}


def wait_for_gpu() -> None:
    """Waits until a GPU, if there is one that this process uses, has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gpu_peak_memory() -> float:
    """The most memory that tensors of this process ever took on a GPU.

    Returns:
        In GiB; 0 where none is used.
    """
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else 0.0


def better(*measured: Mapping[str, MatrixRate]) -> dict[str, MatrixRate]:
    """The best of several measurements, backend by backend.

    Args:
        *measured: Of :func:`matrix_rates`.

    Returns:
        Likewise.
    """
    backends = {backend for rates in measured for backend in rates}
    return {
        backend: max((rates[backend] for rates in measured if backend in rates), key=lambda rate: rate.gflops)
        for backend in (*BACKENDS, GPU)
        if backend in backends
    }


def best(rates: Mapping[str, MatrixRate]) -> float:
    """What the machine reaches, by whichever backend.

    Args:
        rates: Of :func:`matrix_rates`.

    Returns:
        In GFLOP a second.
    """
    return max(rate.gflops for rate in rates.values())


def _rate_of(product: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int, int], repeats: int) -> float:
    rows, inner, outer = shape
    x, weight = torch.rand(rows, inner), torch.rand(outer, inner)
    fastest = float("inf")
    with torch.no_grad():
        for _ in range(repeats):
            started = time.perf_counter()
            product(x, weight)
            fastest = min(fastest, time.perf_counter() - started)
    return 2 * rows * inner * outer / fastest / 1e9


def peak_memory(proc: Path = Path("/proc")) -> float:
    """The most memory that this process ever held.

    Args:
        proc: Where Linux tells; ``getrusage`` is asked elsewhere, since on Linux it hands on the parent's peak.

    Returns:
        In GiB.
    """
    if (proc / "self" / "status").exists():
        return _memory("VmHWM", proc)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # in bytes on macOS


def memory_now(proc: Path = Path("/proc")) -> float:
    """The memory that this process holds.

    Args:
        proc: Where Linux tells.

    Returns:
        In GiB.
    """
    return _memory("VmRSS", proc)


def forget_peak(proc: Path = Path("/proc")) -> None:
    """Lets :func:`peak_memory` begin anew, from what this process holds now.

    Args:
        proc: Where Linux is told.
    """
    (proc / "self" / "clear_refs").write_text("5")


def _memory(name: str, proc: Path) -> float:
    (line,) = (line for line in (proc / "self" / "status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**20


@dataclass(frozen=True)
class Clock:
    """Seconds that passed, that all cores were busy, and that one process was.

    Attributes:
        wall: Passed.
        busy: Of all cores together, for whomever, other guests of the host included; None where that is not known.
        own: Of the process and its threads.
    """

    wall: float
    busy: float | None
    own: float

    @classmethod
    def read(cls, pid: int, proc: Path = Path("/proc")) -> Clock:
        """The clocks as they stand.

        Args:
            pid: Of the process.
            proc: Where Linux tells.
        """
        wall = time.perf_counter()
        if not (proc / "stat").exists():
            return cls(wall, None, 0.0)
        user, nice, system, _idle, _waiting, irq, softirq, steal, *_ = map(
            int, (proc / "stat").read_text().splitlines()[0].split()[1:]
        )
        # The name in brackets may hold spaces; user and system time are the 14th and 15th field of the line.
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        busy = user + nice + system + irq + softirq + steal
        return cls(wall, busy / _TICKS, (int(fields[11]) + int(fields[12])) / _TICKS)

    def others_since(self, start: Clock) -> float:
        """How many cores everybody else used.

        Args:
            start: An earlier reading.

        Returns:
            Cores, on average; 0 where it is not known.
        """
        if self.busy is None or start.busy is None:
            return 0.0
        others = (self.busy - start.busy) - (self.own - start.own)
        return max(0.0, others / (self.wall - start.wall))
