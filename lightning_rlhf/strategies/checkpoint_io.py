"""Checkpoints that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a used-up quota, a limit on the size of files."""


class AtomicCheckpointIO(_WrappingCheckpointIO):
    """Writes a file beside its target, syncs it, and renames it.

    Lightning writes through the system's temporary folder, which is atomic on one file system only: killed while it
    copies to another, it leaves neither the old checkpoint nor the new one.

    Args:
        checkpoint_io: What writes and reads; paths that are not local are its business alone.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves to ``<path>.tmp``, and renames that to ``path`` once it is on the disk.

        Raises:
            OSError: If there is no room for it; what lay at ``path`` is still there.
        """
        assert self.checkpoint_io is not None
        if "://" in str(path) or Path(path).is_dir():
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".tmp")
        try:
            self.checkpoint_io.save_checkpoint(checkpoint, beside, storage_options)
            if beside.is_file():
                replace_synced(beside, target)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise OSError(
                error.errno,
                f"the checkpoint '{target}' could not be written ({os.strerror(error.errno)}): make room where it is "
                f"to lie and in the temporary folder '{tempfile.gettempdir()}', or let `ModelCheckpoint` keep fewer "
                "(`save_top_k`) or write elsewhere (`dirpath`). The checkpoint before it is whole",
            ) from error
        finally:
            if beside.is_file():
                beside.unlink()


def replace_synced(source: Path, target: Path) -> None:
    """Puts a file in the place of another, both before and after on the disk.

    Args:
        source: A whole file on the same file system.
        target: What it becomes.
    """
    _sync(source)
    os.replace(source, target)
    _sync(target.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Puts a folder in the place of another. Killed on the way, it leaves the old one under ``<target>.old``.

    Args:
        source: A whole folder on the same file system.
        target: What it becomes; a file or folder may be there.
    """
    for path in source.rglob("*"):
        _sync(path)
    _sync(source)
    old = target.with_name(target.name + ".old")
    _remove(old)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    _sync(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_checkpoints_atomic(strategy: Strategy) -> None:
    """Wraps what a strategy writes checkpoints with, once.

    Args:
        strategy: Of the trainer.
    """
    checkpoint_io: CheckpointIO = strategy.checkpoint_io
    outer = None
    while isinstance(checkpoint_io, _WrappingCheckpointIO):
        if isinstance(checkpoint_io, AtomicCheckpointIO):
            return
        outer, checkpoint_io = checkpoint_io, checkpoint_io._checkpoint_io  # type: ignore[assignment]
    if outer is None:
        strategy.checkpoint_io = AtomicCheckpointIO(checkpoint_io)
    else:  # an asynchronous writer stays outside, so that the renaming happens when the writing does
        outer._checkpoint_io = AtomicCheckpointIO(checkpoint_io)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
