"""A disk that is full when a checkpoint is to be written."""

import errno
import re

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.runs.recording import CASES, assert_goes_on, checkpoint, run

resource = pytest.importorskip("resource")  # not on Windows


@pytest.fixture(autouse=True)
def _limit():
    """Whatever a test does to the limit on files is undone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Fill(Callback):
    """From a batch on, no file may grow beyond so many bytes."""

    def __init__(self, batch, size=50_000):
        self.batch, self.size = batch, size

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.invariant(36, 39)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize("on_exception", [False, True])
def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_still_loads(tmp_path, on_exception):
    keep = ModelCheckpoint(
        tmp_path / "kept",
        filename="{step}",
        save_last=True,
        every_n_train_steps=2,
        save_on_train_epoch_end=False,
        save_on_exception=on_exception,
    )
    case = CASES["ppo"]
    with pytest.raises(OSError, match="the checkpoint '.*' could not be written") as caught:
        run(case, callbacks=[Fill(batch=4), keep], max_epochs=3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    message = str(caught.value)
    assert caught.value.errno == errno.EFBIG
    assert re.search(rf"'{tmp_path}/kept/step=\d+.ckpt' could not be written \(File too large\): make room", message)
    assert message.count("\n") == 0
    saved = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert len(saved) == 2
    assert saved[0] == "last.ckpt"
    assert (tmp_path / "kept" / "last.ckpt").stat().st_size > 50_000  # or nothing was tried
    for name in saved:
        assert checkpoint(tmp_path / "kept" / name)["lightning_rlhf"]["iteration"] == 3
    assert_goes_on(run(case, max_epochs=3), run(case, tmp_path / "kept" / "last.ckpt", max_epochs=3), 3)
