"""The same reward for every word or at the end of a response: one table and one plot, of score against episodes.

A policy with random weights writes 24 words of an alphabet of twelve. A word is worth 1/24 if it is the next in the
alphabet after the one before it. Once :class:`DenseReward` puts each word's score on its token, once the sum comes with
the last token; all else is the same. Run it with::

    python -m benchmarks.dense_rewards
"""

from __future__ import annotations

import argparse
import functools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.curves import band, picture
from benchmarks.randomwalks import be_quiet
from lightning_rlhf import DenseReward, PPOModule, PromptDataModule

LETTERS = "abcdefghijkl"
WORDS = 24
PROMPTS_AT_A_TIME = 48
MILESTONES = (0.25, 0.5, 0.75)
"""Mean scores whose first crossing the table has."""


def words(text: str) -> list[tuple[int, int]]:
    """Where each word of a text is."""
    return [(2 * i, 2 * i + 1) for i in range((len(text) + 1) // 2)]


def per_word(prompts: list[str], segments: list[list[str]]) -> list[list[float]]:
    """Scores words by those before them."""

    def score(before: str, word: str) -> float:
        return float(LETTERS.find(word) == (LETTERS.find(before) + 1) % len(LETTERS)) / WORDS

    return [
        [score(*pair) for pair in zip([prompt, *row], row, strict=False)]
        for prompt, row in zip(prompts, segments, strict=True)
    ]


def at_the_end(prompts: list[str], responses: list[str]) -> list[float]:
    """The same, as one score per response."""
    return [sum(row) for row in per_word(prompts, [response.split() for response in responses])]


REWARDS: dict[str, Any] = {"per word": DenseReward(per_word, split=words), "at the end": at_the_end}


class Curve(Callback):
    """Keeps the mean score of each iteration."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_experience(self, trainer: L.Trainer, module: PPOModule, experience: Any) -> None:
        """Called once an iteration."""
        self.scores.append(float(experience.scores.total.mean()))


def tokenizer() -> Any:
    """A token a letter, between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*LETTERS, "<eos>", "<pad>"])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token="<eos>", pad_token="<pad>")


def learn(reward: Any, seed: int, iterations: int) -> list[float]:
    """Trains from random weights.

    Args:
        reward: Of :data:`REWARDS`.
        seed: Of the weights and all that is drawn.
        iterations: Of 48 responses each.

    Returns:
        The mean score of each iteration.
    """
    from transformers import GPT2Config

    size = len(LETTERS) + 2
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=size - 2, eos_token_id=size - 2
    )
    module = PPOModule(
        config,
        reward=reward,
        tokenizer=tokenizer(),
        sampling={"max_new_tokens": WORDS, "min_new_tokens": WORDS},
        kl_coef=0.0,
        minibatch_size=PROMPTS_AT_A_TIME,
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3),
        seed=seed,
    )
    curve = Curve()
    data = PromptDataModule(
        list(LETTERS) * (PROMPTS_AT_A_TIME // len(LETTERS) * iterations), batch_size=PROMPTS_AT_A_TIME
    )
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, callbacks=[curve], **quiet
    )
    trainer.fit(module, datamodule=data)
    return curve.scores


def reached(scores: Tensor, milestone: float) -> str:
    """After how many episodes a curve first has a score, over seeds.

    Args:
        scores: (seed, iteration).
        milestone: The score.

    Returns:
        The mean, and the slowest seed in brackets; how many seeds came that far where not all did.
    """
    arrived = (scores >= milestone).any(1)
    if not bool(arrived.all()):
        return f"{int(arrived.sum())} of {len(scores)} seeds"
    episodes = PROMPTS_AT_A_TIME * (1 + (scores >= milestone).float().argmax(1))
    return f"{int(episodes.float().mean()):,} ({int(episodes.max()):,})"


def plot(curves: dict[str, Tensor], path: Path) -> None:
    """Draws the curves, a mean over seeds in a band from the lowest to the highest.

    Args:
        curves: (seed, iteration) each.
        path: Of the PNG.
    """
    with picture(path, figsize=(6, 4)) as axes:
        for name, scores in curves.items():
            band(axes, PROMPTS_AT_A_TIME * torch.arange(1, scores.shape[1] + 1), scores, name)
        axes.set(xlabel="episodes", ylabel="mean score of the episodes", ylim=(0.0, 1.02))
        axes.legend(loc="lower right")


def main(args: list[str] | None = None) -> None:
    """Prints the table, and writes the plot.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense_rewards", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, default=Path("outputs/dense-rewards.png"), help="the plot")
    options = parser.parse_args(args)
    be_quiet()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(options.threads)
    curves = {
        name: torch.tensor([learn(reward, seed, options.iterations) for seed in options.seeds])
        for name, reward in REWARDS.items()
    }
    table = Table(title=f"Episodes until a mean score is reached, mean over seeds {options.seeds} (the slowest)")
    table.add_column("the reward comes")
    for column in (*map(str, MILESTONES), f"score of the last of {options.iterations} iterations"):
        table.add_column(column, justify="right")
    for name, scores in curves.items():
        last = f"{float(scores[:, -1].mean()):.3f} ({float(scores[:, -1].min()):.3f})"
        table.add_row(name, *(reached(scores, milestone) for milestone in MILESTONES), last)
    console = Console(width=max(120, Console().width))
    console.print(table)
    plot(curves, options.output)
    console.print(f"The curves: {options.output}")


if __name__ == "__main__":
    main()
