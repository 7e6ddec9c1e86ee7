import os
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_rlhf import ConversationDataModule, SFTModule
from lightning_rlhf.strategies.checkpoint_io import AtomicCheckpointIO, make_checkpoints_atomic, replace_synced
from tests.networks import tiny_gpt2, word_tokenizer
from tests.training import bare_trainer, sgd

OLD, NEW = {"step": 1}, {"step": 2}


class Recording(TorchCheckpointIO):
    """Remembers where it was told to write, and what lay at the target meanwhile."""

    def __init__(self, target=None, error=None):
        self.paths, self.meanwhile = [], []
        self.target, self.error = target, error

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.paths.append(Path(path))
        super().save_checkpoint(checkpoint, path, storage_options)
        if self.target is not None:
            self.meanwhile.append(torch.load(self.target) if self.target.exists() else None)
        if self.error is not None:
            Path(path).write_bytes(b"half")
            raise self.error


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.invariant(39)
def test_a_checkpoint_is_written_beside_the_old_one_and_then_takes_its_place(tmp_path):
    target = tmp_path / "last.ckpt"
    torch.save(OLD, target)
    inner = Recording(target)
    AtomicCheckpointIO(inner).save_checkpoint(NEW, target)
    assert inner.paths == [tmp_path / "last.ckpt.tmp"]
    assert inner.meanwhile == [OLD]
    assert torch.load(target) == NEW
    assert files(tmp_path) == ["last.ckpt"]


@pytest.mark.invariant(39)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_checkpoint_whole_and_nothing_half(tmp_path, error):
    target = tmp_path / "last.ckpt"
    torch.save(OLD, target)
    with pytest.raises(type(error)):
        AtomicCheckpointIO(Recording(error=error)).save_checkpoint(NEW, target)
    assert torch.load(target) == OLD
    assert files(tmp_path) == ["last.ckpt"]


@pytest.mark.invariant(39)
def test_what_a_kill_left_beside_is_overwritten(tmp_path):
    (tmp_path / "last.ckpt.tmp").write_bytes(b"half")
    AtomicCheckpointIO(TorchCheckpointIO()).save_checkpoint(NEW, str(tmp_path / "last.ckpt"))
    assert torch.load(tmp_path / "last.ckpt") == NEW
    assert files(tmp_path) == ["last.ckpt"]


@pytest.mark.invariant(39)
def test_a_file_is_on_the_disk_before_it_is_renamed_and_the_renaming_after(tmp_path, monkeypatch):
    done = []

    def sync(descriptor):
        opened = os.fstat(descriptor)
        paths = [path for path in (source, target, tmp_path) if path.exists()]
        done.extend(("sync", str(path)) for path in paths if os.path.samestat(opened, path.stat()))

    def replace(source, target, really=os.replace):
        done.append(("rename", str(source), str(target)))
        really(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_text("whole")
    replace_synced(source, target)
    assert done == [("sync", str(source)), ("rename", str(source), str(target)), ("sync", str(tmp_path))]
    assert target.read_text() == "whole"


def test_folders_are_made_where_they_are_missing(tmp_path):
    AtomicCheckpointIO(TorchCheckpointIO()).save_checkpoint(NEW, tmp_path / "a" / "b" / "last.ckpt")
    assert torch.load(tmp_path / "a" / "b" / "last.ckpt") == NEW


def test_what_is_no_local_file_is_left_to_whoever_writes_it(tmp_path):
    class Remote(Recording):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.paths.append(str(path))

    inner = Remote()
    AtomicCheckpointIO(inner).save_checkpoint(NEW, "s3://bucket/last.ckpt")
    AtomicCheckpointIO(inner).save_checkpoint(NEW, tmp_path)
    assert inner.paths == ["s3://bucket/last.ckpt", str(tmp_path)]
    assert files(tmp_path) == []


def test_reading_and_removing_are_the_inner_writers(tmp_path):
    path = tmp_path / "last.ckpt"
    atomic = AtomicCheckpointIO(TorchCheckpointIO())
    atomic.save_checkpoint(NEW, path)
    assert atomic.load_checkpoint(path) == NEW
    atomic.remove_checkpoint(path)
    assert files(tmp_path) == []


def test_a_strategy_is_wrapped_once():
    strategy = SingleDeviceStrategy()
    make_checkpoints_atomic(strategy)
    wrapped = strategy.checkpoint_io
    make_checkpoints_atomic(strategy)
    assert strategy.checkpoint_io is wrapped
    assert type(wrapped) is AtomicCheckpointIO
    assert type(wrapped.checkpoint_io) is TorchCheckpointIO


@pytest.mark.parametrize("inner", [None, TorchCheckpointIO()])
def test_an_asynchronous_writer_stays_outside(tmp_path, inner):
    writer = AsyncCheckpointIO(inner)
    strategy = SingleDeviceStrategy(checkpoint_io=writer)
    for _ in range(2):
        make_checkpoints_atomic(strategy)
        assert strategy.checkpoint_io is writer
        assert type(writer.checkpoint_io) is AtomicCheckpointIO
        assert type(writer.checkpoint_io.checkpoint_io) is TorchCheckpointIO
    writer.save_checkpoint(NEW, tmp_path / "last.ckpt")
    writer.teardown()
    assert torch.load(tmp_path / "last.ckpt") == NEW
    assert files(tmp_path) == ["last.ckpt"]


@pytest.mark.invariant(39)
def test_lightnings_own_checkpoints_go_through_it(tmp_path):
    inner = Recording()
    module = SFTModule(tiny_gpt2(layers=1), tokenizer=word_tokenizer(), optimizer=sgd)
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_last=True)
    trainer = bare_trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True, plugins=[inner])
    for _ in range(2):  # it is wrapped once, however often it fits
        trainer.fit(module, datamodule=ConversationDataModule(["a b", "c"], batch_size=2))
        assert trainer.strategy.checkpoint_io.checkpoint_io is inner
        trainer.fit_loop.max_epochs += 1
    trainer.save_checkpoint(tmp_path / "asked.ckpt")
    assert files(tmp_path) == ["asked.ckpt", "last.ckpt", "step=3.ckpt"]
    assert {path.suffix for path in inner.paths} == {".tmp"}
    assert torch.load(tmp_path / "asked.ckpt", weights_only=True)["global_step"] == 3
