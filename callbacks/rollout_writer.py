"""Everything that the policy writes, in files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlhf.batches import Experience
from lightning_rlhf.callbacks.due import DueCallback
from lightning_rlhf.modules.ranks import agree, rank, world_size


class RolloutWriter(DueCallback):
    """Writes rollouts as JSONL: a line a response, in ``rank-0.jsonl`` for process 0 and so on.

    A line holds ``iteration``; ``row``, the response's number in the iteration over all processes; ``prompt`` and
    ``response`` as the reward saw them; ``prompt_tokens`` and ``response_tokens`` without padding; ``truncated``;
    ``scores`` by name, ``total`` being their weighted sum and null where one did not apply; ``token_scores`` where a
    reward is dense; and ``metadata``. Nothing is sent between processes: the files together, sorted by ``iteration``
    and ``row``, are the run.

    A line is in the file before the updates that it leads to, and on the disk before the next checkpoint is written.
    A resumed run takes away what was written after its checkpoint, a line cut short by a kill too; pass ``dirpath`` so
    that it finds the files. A run from the start moves files that it finds to ``rank-0.jsonl.1`` and so on.

    Args:
        dirpath: The folder; ``rollouts`` beside the first logger's files by default.
        every_n_iterations: How often.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, every_n_iterations: int = 1) -> None:
        super().__init__(every_n_iterations)
        self.dirpath = dirpath
        self._folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Finds out where to write; a collective."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "iteration"):
            raise ValueError(
                f"`RolloutWriter` writes what a policy wrote, and {type(pl_module).__name__} rolls nothing out: leave "
                "it out."
            )
        beside_logs = Path(trainer.log_dir or trainer.default_root_dir) / "rollouts"
        self._folder = beside_logs if self.dirpath is None else Path(self.dirpath)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Takes away what this run will write again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ours = [self._folder / f"rank-{rank()}.jsonl"]
        if rank() == 0:  # of a run on more processes
            ours += [path for path in self._folder.glob("rank-*.jsonl") if _rank_of(path) >= world_size()]
        for path in ours:
            if path.exists() and pl_module.iteration == 0 and trainer.ckpt_path is None:
                move_aside(path)
            elif path.exists():
                cut(path, pl_module.iteration)

    def on_experience(self, trainer: L.Trainer, module: Any, experience: Experience) -> None:
        """Called once an iteration, when scores are there and before the updates; a collective."""
        if not self.is_due(module):
            return
        error: Exception | None = None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                for line in lines(experience, module.iteration, module.responses_per_prompt):
                    file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        except Exception as failure:
            error = failure
        agree(error, f"`RolloutWriter` in {self._folder}", len(experience), module.device)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Makes sure that what led to the checkpoint is on the disk."""
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    @property
    def _path(self) -> Path:
        return self._folder / f"rank-{rank()}.jsonl"


def lines(experience: Experience, iteration: int, group: int) -> Iterator[dict[str, Any]]:
    """What is written of each response.

    Args:
        experience: Of this process.
        iteration: The present one.
        group: Responses of a prompt.

    Yields:
        Plain values under the names that stand in the file.
    """
    scores = {"total": experience.scores.total, **experience.scores.by_name}
    by_name = {name: values.tolist() for name, values in scores.items()}
    prompt_tokens = _rows(experience.prompt_tokens, experience.prompt_mask)
    response_tokens = _rows(experience.response_tokens, experience.response_mask)
    dense = experience.scores.token_scores
    token_scores = None if dense is None else _rows(dense, experience.response_mask)
    for i, truncated in enumerate(experience.truncated.tolist()):
        line = {
            "iteration": iteration,
            "row": (i // group * world_size() + rank()) * group + i % group,
            "prompt": experience.prompts[i],
            "response": experience.responses[i],
            "prompt_tokens": prompt_tokens[i],
            "response_tokens": response_tokens[i],
            "truncated": truncated,
            "scores": {name: None if math.isnan(values[i]) else values[i] for name, values in by_name.items()},
            "metadata": {key: values[i] for key, values in experience.metadata.items()},
        }
        yield line if token_scores is None else {**line, "token_scores": token_scores[i]}


def cut(path: Path, iteration: int) -> None:
    """Takes away the lines of an iteration and of all that follow, and one that was cut short.

    Args:
        path: Of a file in the order of iterations.
        iteration: The first that is to go.
    """
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] >= iteration:
                break
            kept += len(line)
    os.truncate(path, kept)


def move_aside(path: Path) -> None:
    """Gives way to a new file.

    Args:
        path: Of a file that another run left.
    """
    aside = next(name for name in (path.with_name(f"{path.name}.{n}") for n in count(1)) if not name.exists())
    rank_zero_warn(f"`RolloutWriter` found {path} of another run, which is now {aside.name}.")
    os.replace(path, aside)


def _rows(values: Tensor, mask: Tensor) -> list[list[Any]]:
    return [row[counts].tolist() for row, counts in zip(values.cpu(), mask.cpu(), strict=True)]


def _rank_of(path: Path) -> int:
    number = path.stem.removeprefix("rank-")
    return int(number) if number.isdecimal() else -1
