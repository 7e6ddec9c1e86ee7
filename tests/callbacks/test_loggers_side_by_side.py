"""W&B without a network, CSV and TensorBoard in one run: what was logged is read back from the files of each."""

import csv
import json
import struct

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_rlhf import PPOModule
from lightning_rlhf.callbacks import RewardLogger, SampleTable
from tests.training import PROMPTS, fit, module_of

FULL, FIRST, _, LAST = range(1, 5)
ITERATIONS = 3
SCALARS = ("reward/mean", "kl/sequence", "policy/loss", "reward/total/std", "reward/total/task/x", "time/update")
ROWS = [{"prompt": prompt, "task": task} for prompt, task in zip(PROMPTS, "xyxyxx", strict=True)]


def records(data):
    """The records of W&B's file: LevelDB's log format, after seven bytes of its own.

    Blocks of 32 KiB hold pieces of records, each after a checksum, its length and whether it is a record's first.
    """
    place, record = 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        piece = data[place + 7 : place + 7 + length]
        record = piece if kind in (FULL, FIRST) else record + piece
        if kind in (FULL, LAST):
            yield record
        place += 7 + length


def offline_rows(folder):
    """What W&B kept of a run, row by row."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                *groups, last = item.nested_key or [item.key]
                within = row
                for group in groups:
                    within = within.setdefault(group, {})
                within[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, and the experience of every iteration."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    folder = tmp_path_factory.mktemp("loggers")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "dryrun")  # the logger sets it and leaves it set
    for kind in ("CACHE", "CONFIG", "DATA"):
        patch.setenv(f"WANDB_{kind}_DIR", str(folder / kind))
    settings = wandb.Settings(console="off", x_disable_meta=True, x_disable_stats=True, silent=True)
    loggers = [
        TensorBoardLogger(folder, name="tensorboard", version=""),
        WandbLogger(save_dir=folder, offline=True, settings=settings),
        CSVLogger(folder, name="csv", version=""),
    ]
    callbacks = [RewardLogger(group_by="task"), SampleTable(every_n_iterations=2, num_rows=2, console=False)]
    seen = fit(module_of(PPOModule), iterations=ITERATIONS, prompts=ROWS, logger=loggers, callbacks=callbacks)
    wandb.finish()
    yield folder, seen
    patch.undo()


def in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0}).Reload()


def in_csv(folder, name):
    with (folder / "csv" / "metrics.csv").open() as lines:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name)}


def in_wandb(folder, name):
    return {row["trainer/global_step"]: row[name] for row in offline_rows(folder) if name in row}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALARS)
def test_every_logger_has_every_number_of_every_iteration(run, name):
    folder, seen = run
    expected = in_csv(folder, name)
    assert sorted(expected) == list(range(ITERATIONS))
    assert {event.step: event.value for event in in_tensorboard(folder).Scalars(name)} == pytest.approx(
        expected, rel=1e-6
    )
    assert in_wandb(folder, name) == pytest.approx(expected, rel=1e-6)
    if name == "reward/mean":
        means = [float(experience.scores.total.mean()) for experience in seen.experiences]
        assert [expected[i] for i in range(ITERATIONS)] == pytest.approx(means, abs=1e-6)


@pytest.mark.slow
def test_histograms_count_every_response(run):
    folder, seen = run
    drawn = in_wandb(folder, "reward/total/histogram")
    in_events = {
        event.step: event.histogram_value for event in in_tensorboard(folder).Histograms("reward/total/histogram")
    }
    assert sorted(drawn) == sorted(in_events) == list(range(ITERATIONS))
    for iteration, experience in enumerate(seen.experiences):
        histogram = drawn[iteration]
        scores = experience.scores.total.double().numpy()
        counts, _ = np.histogram(scores, bins=np.array(histogram["bins"]))
        assert histogram["values"] == counts.tolist()
        assert sum(histogram["values"]) == in_events[iteration].num == len(scores)
        assert np.quantile(scores, 0.25) == pytest.approx(in_csv(folder, "reward/total/q25")[iteration], abs=1e-6)


@pytest.mark.slow
def test_tables_of_samples_hold_what_was_written(run):
    folder, seen = run
    tables = in_wandb(folder, "samples")
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in in_tensorboard(folder).Tensors("samples/text_summary")
    }
    assert sorted(tables) == sorted(texts) == [0, 2]
    (files,) = folder.glob("wandb/offline-run-*/files")
    for iteration, entry in tables.items():
        table = json.loads((files / entry["path"]).read_text())
        experience = seen.experiences[iteration]
        assert table["columns"] == ["prompt", "response", "total"]
        assert [row[:2] for row in table["data"]] == [[experience.prompts[i], experience.responses[i]] for i in (0, 1)]
        assert [row[2] for row in table["data"]] == pytest.approx(experience.scores.total[:2].tolist())
        assert all(experience.responses[i] in texts[iteration] for i in (0, 1))
    assert "samples" not in (folder / "csv" / "metrics.csv").read_text()
