"""All callbacks under DDP on two processes, beside one process on the whole batch."""

import csv
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.callbacks import KLController, RewardLogger, RolloutCheckpoint, RolloutWriter, SampleTable
from tests.training import bare_trainer, module_of

ROWS = [{"prompt": prompt, "task": task} for prompt, task in zip("abcdefgh", "xxyxyyyx", strict=True)]
TARGET, HORIZON = 0.5, 200


def train(folder, world_size):
    """Three iterations of eight prompts, two responses each; writes what the callbacks make of them."""
    module = module_of(PPOModule, responses_per_prompt=2, minibatch_size=16, kl_coef=0.1, max_grad_norm=None, seed=3)
    callbacks = [
        KLController(TARGET, HORIZON),
        RewardLogger(group_by="task"),
        RolloutWriter(folder),
        SampleTable(every_n_iterations=1, num_rows=1),
        RolloutCheckpoint(folder / "kept", every_n_rollouts=1, monitor="reward/mean", save_top_k=2, save_last=True),
    ]
    flags = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    logger = CSVLogger(folder, name="", version="")
    trainer = bare_trainer(max_epochs=3, callbacks=callbacks, logger=logger, enable_checkpointing=True, **flags)
    trainer.fit(module, datamodule=PromptDataModule(ROWS, batch_size=8 // world_size, seed=3))
    (folder / f"kl-{trainer.global_rank}.json").write_text(json.dumps(module.kl_coef))


def one_of_two(number, folder, port):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(number),
        "NODE_RANK": "0",
        "WORLD_SIZE": "2",
    }
    torch.set_num_threads(1)
    train(Path(folder), 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train(one, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (str(two), port), nprocs=2)
    return one, two


def numbers(folder):
    with (folder / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return {(name, int(row["step"])): float(value) for row in rows for name, value in row.items() if value}


def written(folder):
    lines = [json.loads(line) for path in folder.glob("rank-*.jsonl") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["iteration"], line["row"]))


@pytest.mark.slow
@pytest.mark.invariant(26, 37)
def test_the_price_of_divergence_counts_the_responses_of_all(folders):
    one, two = folders
    prices = [json.loads((folder / f"kl-{rank}.json").read_text()) for folder, rank in ((one, 0), (two, 0), (two, 1))]
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
        if path.is_dir():
            AutoModelForCausalLM.from_pretrained(path)
        else:
            torch.load(path, weights_only=True)
