"""Every example YAML is read, built and run, on small limits."""

from pathlib import Path

import pytest
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.examples.randomwalks.task import RandomWalks
from tests.networks import network

EXAMPLES = Path(__file__).parents[2] / "examples"
YAMLS = sorted(EXAMPLES.rglob("*.yaml"))
# What a YAML begins from, if an example is to write it first.
FOLDERS = {"outputs/randomwalks/warm-start": RandomWalks}


def test_there_are_yamls():
    assert {"randomwalks/sft.yaml", "randomwalks/ppo.yaml"} <= {path.relative_to(EXAMPLES).as_posix() for path in YAMLS}


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_an_example_runs_as_it_is_written(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = yaml.safe_load(path.read_text())
    policy = run["model"]["init_args"]["policy"]
    if str(policy) in FOLDERS:
        task = FOLDERS[policy]()
        config = task.config()
        config.n_layer, config.n_embd = 2, 24
        network(config).save_pretrained(policy)
        task.tokenizer().save_pretrained(policy)
    limits = [
        "max_epochs=1",
        "limit_train_batches=1",
        "limit_val_batches=1",
        "num_sanity_val_steps=0",
        "accelerator=cpu",
    ]
    limits += ["devices=1", "enable_progress_bar=false", "enable_model_summary=false", "val_check_interval=1.0"]
    main(["fit", "--config", str(path), *(f"--trainer.{limit}" for limit in limits)])
    assert (tmp_path / run["save_pretrained"] / "config.json").is_file()
    (saved,) = tmp_path.rglob("lightning_logs/version_0/config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["class_path"].endswith(run["model"]["class_path"])
