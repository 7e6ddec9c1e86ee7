"""A reward model on comparisons whose truth is known, beside an oracle that knows it.

A response of up to twelve letters is worth what a table says of its letters, on the topic that its prompt names; which
of two responses is preferred is drawn with Bradley's and Terry's probabilities. The oracle has the table, and is wrong
as often as chance has it. Run it with::

    python -m benchmarks.bradley_terry
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.randomwalks import be_quiet
from lightning_rlhf import PreferenceDataModule, RewardModule
from lightning_rlhf.modules.preference_metrics import CalibrationError, PreferenceAccuracy

LETTERS = "abcdefghijklmnop"
TOPICS = "wxyz"
SPREAD = 1.7
"""Standard deviation of a response's worth, by which the oracle is right in about four cases of five."""


def worth_table(seed: int) -> Tensor:
    """What each letter is worth on each topic."""
    table = torch.randn(len(TOPICS), len(LETTERS), generator=torch.Generator().manual_seed(seed))
    return (table - table.mean(1, keepdim=True)) / table.std(1, keepdim=True)


def comparisons(count: int, table: Tensor, seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows for the DataModule, and the true log-odds of what was preferred in each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count, 2), generator=generator)
    letters = torch.randint(len(LETTERS), (count, 2, 12), generator=generator)
    topics = torch.randint(len(TOPICS), (count,), generator=generator)
    is_there = torch.arange(12) < lengths[:, :, None]
    worth = torch.where(is_there, table[topics[:, None, None], letters], 0.0).sum(2)
    worth = SPREAD * worth / lengths.sqrt()
    wins = torch.rand(count, generator=generator) < (worth[:, 0] - worth[:, 1]).sigmoid()
    rows, odds = [], torch.where(wins, worth[:, 0] - worth[:, 1], worth[:, 1] - worth[:, 0])
    for i in range(count):
        texts = [" ".join(LETTERS[k] for k in letters[i, j, : lengths[i, j]].tolist()) for j in (0, 1)]
        better, worse = texts if wins[i] else texts[::-1]
        rows.append({"prompt": TOPICS[topics[i]], "chosen": better, "rejected": worse})
    return rows, odds


def tokenizer() -> Any:
    """Letters between spaces, `<eos>` and `<pad>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*LETTERS, *TOPICS, "<eos>", "<pad>"])}
    words_only = Tokenizer(models.WordLevel(vocabulary))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token="<eos>", pad_token="<pad>")


def reward_module(updates: int, seed: int) -> RewardModule:
    """A small GPT-2 with random weights."""
    from transformers import GPT2Config

    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 16}
    special = {"bos_token_id": 20, "eos_token_id": 20, "pad_token_id": 21}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3, "weight_decay": 0.01}}
    return RewardModule(
        GPT2Config(vocab_size=22, **size, **special),
        tokenizer=tokenizer(),
        optimizer=optimizer,
        lr_scheduler="cosine",
        warmup_updates=updates // 20,
        seed=seed,
    )


def measure(pairs: int, held_out: int, epochs: int, batch_size: int, seed: int) -> dict[str, tuple[float, float]]:
    """Accuracy and calibration error on the held-out pairs, of the model and of the oracle."""
    table = worth_table(seed)
    rows, _ = comparisons(pairs, table, seed + 1)
    test, odds = comparisons(held_out, table, seed + 2)
    data = PreferenceDataModule(rows, test=test, batch_size=batch_size, seed=seed)
    module = reward_module(epochs * pairs // batch_size, seed)
    flags: dict[str, Any] = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, enable_model_summary=False, **flags)
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    oracle = [PreferenceAccuracy(), CalibrationError()]
    for metric in oracle:
        metric.update(odds)
    names = ("accuracy", "calibration_error")
    ours = tuple(found[f"test/preference/{name}"] for name in names)
    return {"reward model": (ours[0], ours[1]), "oracle": (float(oracle[0].compute()), float(oracle[1].compute()))}


def main() -> None:
    """Prints the table, and whether the model is as good as it can be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60_000, help="to learn from")
    parser.add_argument("--held-out", type=int, default=20_000, help="to be measured on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    be_quiet()
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    found = measure(options.pairs, options.held_out, options.epochs, options.batch_size, options.seed)
    table = Table(
        title=f"{options.held_out:,} held-out pairs, seed {options.seed}, {time.perf_counter() - start:.0f} s"
    )
    for column in ("", "accuracy", "calibration error, 15 bins"):
        table.add_column(column)
    for name, (accuracy, error) in found.items():
        table.add_row(name, f"{accuracy:.4f}", f"{error:.4f}")
    Console().print(table)
    gap, error = found["oracle"][0] - found["reward model"][0], found["reward model"][1]
    print(f"{100 * gap:.2f} points below the oracle (at most 1), calibration error {error:.4f} (below 0.03)")
    raise SystemExit(not (gap <= 0.01 and error < 0.03))


if __name__ == "__main__":
    main()
