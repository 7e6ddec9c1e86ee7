import difflib
import inspect
import sys
import types

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.examples.existing_project import after, before
from tests.training import PROMPTS, bare_trainer, module_of

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize("script", [before, after])
def test_the_project_runs_before_and_after(tmp_path, script):
    trainer = script.main(str(tmp_path), max_epochs=2, **QUIET)
    assert trainer.global_step == {before: 2 * 5, after: 2 * 5 * 4}[script]
    monitored = {before: "val_loss", after: "val/reward/mean"}[script]
    assert trainer.checkpoint_callback.best_model_score == trainer.callback_metrics[monitored]
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert monitored in header
    assert any(name.startswith("lr-") for name in header)  # the project's own LearningRateMonitor


def test_it_takes_fewer_than_ten_changed_lines():
    lines = [inspect.getsource(script).splitlines() for script in (before, after)]
    changes = [line for line in difflib.ndiff(*lines) if line.startswith(("+ ", "- ")) and line[2:].strip()]
    added = [line for line in changes if line.startswith("+ ")]
    removed = [line for line in changes if line.startswith("- ")]
    assert len(removed) <= len(added) < 10
    assert len(added) >= 4  # or nothing was compared


def test_the_other_lightning_is_warned_of_and_its_datamodule_refused(monkeypatch):
    other = types.ModuleType("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", other)
    with pytest.warns(UserWarning, match="`pytorch_lightning` is imported, whose Trainer refuses PPOModule as no"):
        module = module_of(PPOModule)

    class Theirs:
        __module__ = "pytorch_lightning.core.datamodule"
        allow_zero_length_dataloader_with_multiple_devices = False

    class Data(Theirs, PromptDataModule):
        pass

    with pytest.raises(TypeError, match="`datamodule=Data` is a DataModule of `pytorch_lightning`, and the Trainer is"):
        bare_trainer(max_epochs=1).fit(module, datamodule=Data(PROMPTS))


def test_a_loader_that_yields_something_else_is_refused_as_before():
    with pytest.raises(TypeError, match="yields list, and PPOModule learns from PromptBatch: use PromptDataModule"):
        bare_trainer(max_epochs=1).fit(module_of(PPOModule), DataLoader(torch.arange(4), collate_fn=list))
