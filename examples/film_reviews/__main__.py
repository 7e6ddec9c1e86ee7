"""What the three stages on film reviews begin from (`prepare`), and what came of them (`compare`)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.examples.film_reviews.reviews import read
from lightning_rlhf.examples.film_reviews.task import (
    HELD_OUT,
    OPENING,
    FilmReviews,
    lexicon_score,
    rows_of,
    write,
)
from lightning_rlhf.examples.runs import quiet_trainer

FOLDER = Path("outputs/film_reviews")
SAMPLING = {"max_new_tokens": 32}
PROMPTS = 2560
HELD_OUT_PROMPTS = 128


def prepare(folder: Path, prompts: int, reviews: Path | None = None, held_out: int = HELD_OUT) -> None:
    """Writes what is learnt from, and the tokenizer.

    Args:
        folder: To write to.
        prompts: How many prompts there are to learn from.
        reviews: A CSV file with others than those of the package.
        held_out: Reviews of each kind that are set apart.
    """
    films = FilmReviews(read(reviews), held_out=held_out)
    for part, is_held_out in (("", False), ("held_out_", True)):
        count = HELD_OUT_PROMPTS if is_held_out else prompts
        write(folder / f"{part}reviews.jsonl", films.texts(is_held_out))
        write(folder / f"{part}comparisons.jsonl", films.comparisons(is_held_out))
        write(folder / f"{part}prompts.jsonl", films.prompts(count, held_out=is_held_out))
    films.tokenizer().save_pretrained(folder / "tokenizer")


def measured(policy: Path, judge: Path, prompts: list[str]) -> tuple[Mapping[str, float], list[str]]:
    """How good reviews are that a policy writes, one sample a prompt.

    Args:
        policy: Its folder.
        judge: Of the reward model.
        prompts: How the reviews begin.

    Returns:
        Means of the reward and of the lexicon's score, and the likeliest reviews.
    """
    module = PPOModule(policy, reward=str(judge), metric_fn=lexicon_score, sampling=SAMPLING)
    trainer = quiet_trainer(logger=False, enable_progress_bar=False)
    data = PromptDataModule(validation=prompts, batch_size=len(prompts))
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    return found, module.generate(prompts[:3], {**SAMPLING, "temperature": 0.0})


def compare(folder: Path) -> None:
    """Prints rewards and samples before and after PPO, for prompts that no stage has seen.

    Args:
        folder: Where the stages left their networks.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    prompts = [row["prompt"] for row in rows_of(folder / "held_out_prompts.jsonl")]
    console = Console()
    table = Table(title=f"Reviews of {len(prompts)} held-out beginnings, one sample each")
    for column in ("", "reward", "lexicon"):
        table.add_column(column, justify="right" if column else "left")
    samples: dict[str, Any] = {}
    for name, policy in (("before: imitation", "writer"), ("after: PPO", "policy")):
        found, samples[name] = measured(folder / policy, folder / "judge", prompts)
        table.add_row(name, f"{found['val/reward/mean']:.2f}", f"{found['val/lexicon']:.3f}")
    console.print(table)
    for number, prompt in enumerate(prompts[:3]):
        for name, responses in samples.items():
            begun, gone_on = prompt.removeprefix(OPENING).strip(), responses[number]
            console.print(Text.assemble((f"{name:>18}  ", "dim"), (begun, "bold"), gone_on))


def main(args: list[str] | None = None) -> None:
    """Runs a command of the example.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_rlhf.examples.film_reviews", description=__doc__)
    parser.add_argument("command", choices=["prepare", "compare"])
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="to learn from")
    parser.add_argument("--reviews", type=Path, help="a CSV file with text, label and source, instead of the package's")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="reviews of each kind that are set apart")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of everything that the stages write")
    options = parser.parse_args(args)
    if options.command == "prepare":
        prepare(options.folder, options.prompts, options.reviews, options.held_out)
    else:
        compare(options.folder)


if __name__ == "__main__":
    main()
