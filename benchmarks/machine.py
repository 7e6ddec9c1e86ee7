"""What the machine can do, and whether anybody else was using it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_TICKS = os.sysconf("SC_CLK_TCK")


def matrix_rate(threads: int, repeats: int = 10, n: int = 2048) -> float:
    """The best rate of a product of two square matrices in single precision.

    Args:
        threads: Of torch.
        repeats: Of which the fastest counts.
        n: Rows and columns.

    Returns:
        In GFLOP a second.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.rand(n, n), torch.rand(n, n)
        out = torch.empty(n, n)
        fastest = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            fastest = min(fastest, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * n**3 / fastest / 1e9


def peak_memory(proc: Path = Path("/proc")) -> float:
    """The most memory that this process ever held.

    Args:
        proc: Where Linux tells; ``getrusage`` is asked elsewhere, since on Linux it hands on the parent's peak.

    Returns:
        In GiB.
    """
    status = proc / "self" / "status"
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # in bytes on macOS


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
