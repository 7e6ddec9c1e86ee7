"""Random walks, killed again and again: does every resumed run do what the uninterrupted one does?

One run is left alone. Another one, with the same seed, is killed by SIGKILL at random moments, half of them while a
checkpoint is being written, and resumed each time from the last checkpoint on the disk. Every metric that it logs, of
every iteration and timings aside, must equal the first run's to the bit, and so must the weights at the end::

    python -m benchmarks.kill_and_resume --algorithm ppo --kills 10

Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.table import Table

from lightning_rlhf import GRPOModule, PPOModule, PromptDataModule
from lightning_rlhf.callbacks import RolloutCheckpoint
from lightning_rlhf.examples.randomwalks.task import MAX_NODES, RandomWalks
from lightning_rlhf.examples.randomwalks.training import OWN, adamw, warm_start
from lightning_rlhf.examples.runs import quiet_trainer
from lightning_rlhf.models.reference import fingerprint

SEED = 0
STATEFUL: dict[str, Any] = {"kl_coef": 0.05, "reward_scaling": "running", "lr_scheduler": "linear", "warmup_updates": 8}
"""What makes a run remember more than its weights: a reference, moments of rewards, a schedule."""

MODULES: dict[str, tuple[type, dict[str, Any], int]] = {
    "ppo": (PPOModule, {**OWN.arguments, **STATEFUL}, 3),
    "grpo": (
        GRPOModule,
        {**STATEFUL, "optimizer": lambda groups: adamw(groups, lr=3e-4), "group_size": 4, "minibatch_size": 40},
        1,
    ),
}
"""By algorithm: the module, its arguments, and how often an iteration begins at every start."""


class Lines(Logger):
    """One JSON line an iteration, on the disk before the run goes on."""

    name, version = "lines", 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are the same in all runs."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Timings are left out: no two runs have the same."""
        kept = {name: float(value) for name, value in metrics.items() if not name.startswith(("time/", "speed/"))}
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": step, **kept}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def last_checkpoint(folder: Path) -> Path | None:
    """The latest one, if there is any."""
    whole = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return whole[-1] if whole else None


def train(algorithm: str, start: Path, folder: Path, iterations: int) -> None:
    """What a child does: begins, or goes on from the last checkpoint, and saves after every iteration."""
    torch.set_num_threads(1)
    task = RandomWalks()
    cls, arguments, repeats = MODULES[algorithm]
    sampling = {"max_new_tokens": MAX_NODES - 1}
    module = cls(start, reward=task.score, sampling=sampling, seed=SEED, **arguments)
    prompts = task.prompts * repeats
    data = PromptDataModule(prompts * 4, batch_size=len(prompts), seed=SEED)  # an epoch is four iterations
    keep = RolloutCheckpoint(folder / "checkpoints", every_n_rollouts=1)
    trainer = quiet_trainer(
        max_epochs=-(-iterations // 4),
        callbacks=[keep],
        logger=Lines(folder / "metrics.jsonl"),
        enable_checkpointing=True,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=last_checkpoint(folder))
    (folder / "fingerprint").write_text(fingerprint(module.policy))


def child(algorithm: str, start: Path, folder: Path, iterations: int) -> subprocess.Popen:
    """Starts one."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", "--child", str(start), str(folder)]
    command += ["--algorithm", algorithm, "--iterations", str(iterations)]
    # Lightning writes to the temporary folder first: one on another disk turns the last step into a copy, which takes
    # its time.
    shared = Path("/dev/shm")
    is_other_disk = shared.is_dir() and shared.stat().st_dev != folder.stat().st_dev
    environment = {**os.environ, "TMPDIR": str(shared)} if is_other_disk else None
    with (folder / "printed.txt").open("a") as printed:
        return subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines that were written whole."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 300.0) -> None:
    """Until it holds; a process that ended meanwhile is an error unless it ended well."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return
        time.sleep(0.0005)


def kill(process: subprocess.Popen, folder: Path, while_writing: bool, chance: random.Random) -> str:
    """Kills a child at a random moment after its first iteration since it was started.

    Args:
        process: The child.
        folder: Its own.
        while_writing: Whether to wait for a checkpoint that is under way.
        chance: Draws the moment.

    Returns:
        What it was doing.
    """
    begun = len(read(folder))
    wait_for(lambda: len(read(folder)) > begun, process)
    time.sleep(chance.uniform(0.0, 2.0))
    if while_writing:
        wait_for(lambda: any((folder / "checkpoints").glob("*.tmp")), process)
        time.sleep(chance.uniform(0.0, 0.01))
    if process.poll() is not None:
        return "at its end already"
    process.kill()
    process.wait()
    unfinished = list((folder / "checkpoints").glob("*.tmp"))
    return f"writing ({unfinished[0].stat().st_size / 2**20:.1f} MiB there)" if unfinished else "running"


def compare(expected: dict[int, dict[str, Any]], lines: list[dict[str, Any]]) -> list[str]:
    """What differs, in words."""
    differences = []
    for line in lines:
        known = expected.get(line["iteration"], {})
        names = sorted(known.keys() | line.keys())
        wrong = [name for name in names if known.get(name) != line.get(name)]
        differences += [f"{name} of iteration {line['iteration']}" for name in wrong]
    return differences


def main(args: list[str] | None = None) -> None:
    """Prints a table, a row a kill.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_and_resume", description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=sorted(MODULES), default="ppo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=60, help="at most; one run is as long as all the kills need")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("START", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.child:
        train(options.algorithm, *options.child, options.iterations)
        return

    chance = random.Random(options.seed)
    console = Console(width=120)
    table = Table(title=f"{options.algorithm}, killed {options.kills} times on its way through random walks")
    for column in ("kill", "while it was", "iterations logged", "resumed after", "lines compared", "that differ"):
        table.add_column(column, justify="right")
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        warm_start(RandomWalks(), folder / "start", SEED, epochs=2, enable_progress_bar=False)
        alone = child(options.algorithm, folder / "start", folder / "alone", options.iterations)
        if alone.wait() != 0:
            sys.exit((folder / "alone" / "printed.txt").read_text()[-3000:])
        expected = {line["iteration"]: line for line in read(folder / "alone")}
        console.print(f"uninterrupted: {len(expected)} iterations, {len(expected[0]) - 1} metrics each")
        shot = folder / "shot"
        seen = 0
        for number in range(1, options.kills + 2):
            process = child(options.algorithm, folder / "start", shot, options.iterations)
            last = number > options.kills
            doing = "left alone" if last else kill(process, shot, number % 2 == 0, chance)
            if last and process.wait() != 0:
                failures.append((shot / "printed.txt").read_text()[-3000:])
            lines = read(shot)[seen:]
            seen += len(lines)
            different = compare(expected, lines)
            failures += different
            found = last_checkpoint(shot)
            state = None if found is None else torch.load(found, weights_only=True)  # an error if it is not whole
            resumed = "the start" if state is None else str(state["lightning_rlhf"]["iteration"])
            iterations = f"{lines[0]['iteration']} to {lines[-1]['iteration']}" if lines else "none"
            resumed = "" if last else resumed
            table.add_row("" if last else str(number), doing, iterations, resumed, str(len(lines)), str(len(different)))
            console.print(f"{doing}: {iterations}, {len(different)} differences", highlight=False)
        console.print(table)
        if read(shot)[-1]["iteration"] != max(expected):
            failures.append("the last run did not come to its end")
        elif (shot / "fingerprint").read_text() != (folder / "alone" / "fingerprint").read_text():
            failures.append("the weights at the end")
        left = sorted(path.name for path in (shot / "checkpoints").iterdir())
    if failures:
        console.print("Different:", *failures[:20], sep="\n  ", highlight=False)
        sys.exit(1)
    console.print(f"Equal to the bit, weights included. Left in the folder: {', '.join(left)}.", highlight=False)


if __name__ == "__main__":
    main()
