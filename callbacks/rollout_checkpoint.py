"""Checkpoints of online modules, counted in rollouts, each with the policy as a plain folder beside it."""

from __future__ import annotations

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_rlhf.strategies.checkpoint_io import replace_folder
from lightning_rlhf.strategies.fsdp2 import RLHFStrategy

_UNFINISHED = ".policy-unfinished"
"""How the names of folders end that are being written or removed; they begin with a dot."""


class RolloutCheckpoint(ModelCheckpoint):
    """Saves every so many rollouts, that is, iterations of an online module, or every so often.

    Lightning's own ``ModelCheckpoint`` counts optimizer steps, of which an iteration makes many. Beside each checkpoint
    ``iteration=20.ckpt``, from which training goes on, lies ``iteration=20``, a Hugging Face folder of the policy,
    which goes when its checkpoint goes. Both are written beside their place and renamed, the folder first: where there
    is a checkpoint, it is whole and has its folder, whenever a run is killed.

    Args:
        dirpath: Where to; beside the first logger's files by default.
        filename: Without ending. Fields in braces are filled in: ``iteration``, ``epoch``, ``step`` (of the optimizer)
            and all that is logged.
        every_n_rollouts: Save when the module's count of iterations is a multiple of this.
        train_time_interval: Save when so much time has passed since the last time it had.
        monitor: A metric that says which checkpoints are best, such as ``"reward/mean"``; by default the latest is.
        mode: Whether ``"max"`` or ``"min"`` is best. (Lightning's default is the other one.)
        save_top_k: How many of the best are kept; -1 keeps all, 0 none, so that ``last`` is left.
        save_last: Whether ``last.ckpt`` and ``last`` follow the latest, as copies (True) or links (``"link"``).
        save_policy: Whether the folders are written.
        auto_insert_metric_name: Whether ``{iteration}`` becomes ``iteration=20`` or ``20``.

    Raises:
        ValueError: If neither interval is given, or the module does not roll out.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "{iteration}",
        *,
        every_n_rollouts: int | None = None,
        train_time_interval: timedelta | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        save_top_k: int = 1,
        save_last: bool | Literal["link"] | None = None,
        save_policy: bool = True,
        auto_insert_metric_name: bool = True,
    ) -> None:
        if every_n_rollouts is None and train_time_interval is None:
            raise ValueError("`every_n_rollouts=None` and `train_time_interval=None` never save: give one of them.")
        if every_n_rollouts is not None and every_n_rollouts < 1:
            raise ValueError(f"`every_n_rollouts={every_n_rollouts}` must be at least 1.")
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_epochs=0,  # what Lightning would save by itself is nothing
        )
        self.every_n_rollouts = every_n_rollouts
        self.train_time_interval = train_time_interval
        self.save_policy = save_policy
        self._waits_for_metric = False
        self._superseded: list[str] = []

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold what this one has saved."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_rollouts=self.every_n_rollouts,
            train_time_interval=self.train_time_interval,
        )

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be saved, and tidies up after a run that was killed."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not hasattr(pl_module, "iteration"):
            raise ValueError(
                f"`RolloutCheckpoint` counts rollouts, and {type(pl_module).__name__} makes none: use Lightning's "
                "`ModelCheckpoint`."
            )
        if self.save_policy and "://" in str(self.dirpath):
            raise ValueError(
                f"`dirpath={str(self.dirpath)!r}` is no local folder, which a policy is written to: set "
                "`save_policy=False`, or write locally."
            )
        sharded = getattr(trainer.strategy, "_save_distributed_checkpoint", False)
        if self.save_last is True and sharded and not isinstance(trainer.strategy, RLHFStrategy):
            raise ValueError(
                "`save_last=True` would write a sharded checkpoint over the last one, file by file, under "
                f"{type(trainer.strategy).__name__}: use `save_last='link'`, or `Trainer(strategy='rlhf_fsdp2')`."
            )
        if "://" not in str(self.dirpath) and trainer.is_global_zero:
            tidy(Path(str(self.dirpath)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Saves if it is due; the iteration that has just ended is counted."""
        if not trainer.fast_dev_run and self._is_due(trainer, pl_module.iteration):  # type: ignore[attr-defined]
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Saves what was due before there was the metric by which it is judged."""
        if self._waits_for_metric and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """An epoch's end is nothing special."""

    def _is_due(self, trainer: L.Trainer, iteration: int) -> bool:
        due = self.every_n_rollouts is not None and iteration % self.every_n_rollouts == 0
        if self.train_time_interval is not None:
            assert self._last_time_checked is not None
            now = time.monotonic()
            late = now - self._last_time_checked >= self.train_time_interval.total_seconds()
            if trainer.strategy.broadcast(late):  # clocks differ
                self._last_time_checked = now
                return True
        return due

    def _save(self, trainer: L.Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._waits_for_metric = self.monitor is not None and self.monitor not in candidates
        if not self._waits_for_metric:
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        while self._superseded:  # only now, since `last` was a link to one of them
            self._remove_now(trainer, self._superseded.pop())

    # --- what Lightning's own does, with folders ----------------------------------------------------------------

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        iteration = torch.tensor(trainer.lightning_module.iteration)
        return {**super()._monitor_candidates(trainer), "iteration": iteration}

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if self.save_policy:
            folder = policy_folder(filepath)
            beside = _unfinished(folder)
            trainer.lightning_module.save_pretrained(beside)  # type: ignore[operator]
            if trainer.is_global_zero:
                if folder.is_symlink():
                    folder.unlink()
                replace_folder(beside, folder)
        super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self._superseded.append(filepath)

    def _remove_now(self, trainer: L.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        folder = policy_folder(filepath)
        if self.save_policy and trainer.is_global_zero and folder.is_dir():
            _remove(folder)

    def _link_checkpoint(self, trainer: L.Trainer, filepath: str, linkpath: str) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            if self.save_policy:
                _link(policy_folder(filepath), policy_folder(linkpath))
            _link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()


def policy_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """Where the policy of a checkpoint lies.

    Args:
        checkpoint: Its path.

    Returns:
        The same without ending.

    Example:
        >>> policy_folder("runs/iteration=20.ckpt").as_posix()
        'runs/iteration=20'
    """
    return Path(str(checkpoint).removesuffix(ModelCheckpoint.FILE_EXTENSION))


def tidy(folder: Path) -> None:
    """Takes away what a run that was killed had not finished, and puts back what it was about to replace.

    Args:
        folder: That holds the checkpoints.
    """
    for unfinished in folder.glob(f".*{_UNFINISHED}*"):
        if unfinished.is_symlink():
            unfinished.unlink()
        else:
            shutil.rmtree(unfinished)
    for old in folder.glob("*.old"):
        place = old.with_suffix("")
        ending = ModelCheckpoint.FILE_EXTENSION
        if not place.exists() and (place.suffix == ending or Path(f"{place}{ending}").exists()):
            os.replace(old, place)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_UNFINISHED}")


def _remove(folder: Path) -> None:
    """Removes a folder at once: what is left of it on the way is hidden."""
    if folder.is_symlink():
        folder.unlink()
    else:
        os.replace(folder, _unfinished(folder))
        shutil.rmtree(_unfinished(folder))


def _link(source: Path, place: Path) -> None:
    """Makes a place stand for another, at once."""
    if place.is_dir() and not place.is_symlink():
        _remove(place)
    new = _unfinished(place)
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(source, place.parent))
    os.replace(new, place)
