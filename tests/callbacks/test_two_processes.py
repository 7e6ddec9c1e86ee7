"""All callbacks on two processes, under DDP and FSDP2, beside one process on the whole batch."""

import csv
import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.callbacks import KLController, RewardLogger, RolloutCheckpoint, RolloutWriter, SampleTable
from tests.distributed.spawn import spawned
from tests.training import bare_trainer, module_of

ROWS = [{"prompt": prompt, "task": task} for prompt, task in zip("abcdefgh", "xxyxyyyx", strict=True)]
TARGET, HORIZON = 0.5, 200


def train(strategy, folder):
    """Three iterations of eight prompts, two responses each; leaves what the callbacks make of them in the folder.

    Returns:
        The price of divergence at the end.
    """
    devices = 1 if strategy == "auto" else 2
    module = module_of(PPOModule, responses_per_prompt=2, minibatch_size=16, kl_coef=0.1, seed=3)
    trainer = bare_trainer(
        max_epochs=3,
        strategy=strategy,
        devices=devices,
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=True,
        callbacks=[
            KLController(TARGET, HORIZON),
            RewardLogger(group_by="task"),
            RolloutWriter(folder),
            SampleTable(every_n_iterations=1, num_rows=1),
            RolloutCheckpoint(folder / "kept", every_n_rollouts=1, monitor="reward/mean", save_top_k=2, save_last=True),
        ],
    )
    trainer.fit(module, datamodule=PromptDataModule(ROWS, batch_size=8 // devices, seed=3))
    return module.kl_coef


@pytest.fixture(scope="module", params=["ddp", "rlhf_fsdp2"])
def runs(request, tmp_path_factory):
    """The folders of one process and of two, and the prices that they ended with."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    of_two = spawned("tests.callbacks.test_two_processes", ["train"], request.param, two)["train"]
    assert not any(isinstance(price, str) for price in of_two), of_two
    return (one, two / "train"), [train("auto", one), *of_two]


@pytest.fixture
def folders(runs):
    return runs[0]


def numbers(folder):
    with (folder / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return {(name, int(row["step"])): float(value) for row in rows for name, value in row.items() if value}


def written(folder):
    lines = [json.loads(line) for path in folder.glob("rank-*.jsonl") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["iteration"], line["row"]))


@pytest.mark.slow
@pytest.mark.invariant(26, 37)
def test_the_price_of_divergence_counts_the_responses_of_all(runs):
    (_, two), prices = runs
    assert len(prices) == 3
    assert prices == pytest.approx([prices[0]] * 3, rel=1e-6)
    logged = numbers(two)
    expected = 0.1
    for iteration in range(3):
        assert logged["kl/coef", iteration] == pytest.approx(expected, rel=1e-6)
        error = logged["kl/sequence", iteration] / TARGET - 1
        expected *= 1 + min(max(error, -0.2), 0.2) * 16 / HORIZON
    assert prices[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.invariant(37, 40)
def test_what_is_logged_of_rewards_and_groups_is_that_of_all_responses(folders):
    one, two = (numbers(folder) for folder in folders)
    names = {key for key in one if key[0].startswith("reward/")}
    assert {"reward/total/task/x", "reward/total/task/y", "reward/total/std", "reward/total/q05"} < {
        name for name, _ in names
    }
    assert names == {key for key in two if key[0].startswith("reward/")}
    assert {key: two[key] for key in names} == pytest.approx({key: one[key] for key in names}, abs=1e-6)


@pytest.mark.slow
@pytest.mark.invariant(28, 37)
def test_the_files_of_both_together_are_the_file_of_one(folders):
    one, two = (written(folder) for folder in folders)
    assert len(one) == len(two) == 48
    assert {path.name for path in folders[1].glob("rank-*")} == {"rank-0.jsonl", "rank-1.jsonl"}
    assert two == one


@pytest.mark.slow
@pytest.mark.invariant(39)
def test_checkpoints_and_folders_are_written_once_and_whole(folders):
    names = [sorted(path.name for path in (folder / "kept").iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) == 6
    for name in names[1]:
        path = folders[1] / "kept" / name
        if path.is_dir() and path.suffix == ".ckpt":  # of shards
            torch.load(path / "meta.pt", weights_only=True)
        elif path.is_dir():
            AutoModelForCausalLM.from_pretrained(path)
        else:
            torch.load(path, weights_only=True)
