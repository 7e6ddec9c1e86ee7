"""Two processes on this machine that run cases one after the other and hand back what came of them.

Lightning would start its second process by running the command line again, which under pytest is pytest. So both are
started here, before there is a Trainer. Starting them takes longer than most cases: one pair runs all of a strategy's.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

WORLD_SIZE = 2


def spawned(cases: str, names: list[str], strategy: str, folder: Path, limit: float = 600.0) -> dict[str, list[Any]]:
    """Runs functions on two processes.

    Args:
        cases: The module that holds them.
        names: Of the functions; each gets the strategy's name and a folder that both processes share.
        strategy: The Trainer's.
        folder: Where results and what the processes printed are left.
        limit: In seconds, after which both are killed.

    Returns:
        For each function what it returned on each process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD_SIZE), "NODE_RANK": "0"}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    shared["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in range(WORLD_SIZE):
        with (folder / f"printed-{rank}.txt").open("w") as printed:
            command = [sys.executable, "-m", "tests.distributed.spawn", cases, strategy, str(folder), *names]
            environment = {**os.environ, **shared, "LOCAL_RANK": str(rank), "RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, env=environment, stdout=printed, stderr=printed, start_new_session=True)
            )
    try:
        deadline = time.monotonic() + limit
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            late = time.monotonic() > deadline
            if failed or late:
                reason = f"more than {limit} seconds" if late else f"process {failed[0]} failed"
                raise AssertionError(f"{reason}:\n" + "\n".join(_tail(folder, rank) for rank in range(WORLD_SIZE)))
            time.sleep(0.1)
        assert [process.returncode for process in processes] == [0] * WORLD_SIZE, _tail(folder, 0) + _tail(folder, 1)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]
    return {name: [of_rank[name] for of_rank in results] for name in names}


def _tail(folder: Path, rank: int) -> str:
    return f"--- process {rank} ---\n" + (folder / f"printed-{rank}.txt").read_text()[-4000:]


def main(cases: str, strategy: str, folder: str, *names: str) -> None:
    """What each of the processes does; a failure is a result, so that one case does not hide the others."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    module = importlib.import_module(cases)
    results: dict[str, Any] = {}
    for name in names:
        print("case", name, flush=True)
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        try:
            results[name] = getattr(module, name)(strategy, place)
        except BaseException:
            results[name] = traceback.format_exc()
            print(results[name], flush=True)
    torch.save(results, Path(folder) / f"results-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
