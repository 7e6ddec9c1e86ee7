"""Letters put in order by an encoder-decoder, in a minute on a laptop: imitation, PPO, a table and a curve."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_rlhf import SFTModule
from lightning_rlhf.examples.seq2seq.task import MODELS
from lightning_rlhf.examples.seq2seq.training import evaluate, learn, warm_start


def plot(rewards: list[float], before: float, model: str, path: Path) -> None:
    """Draws the curve of the mean reward, from where imitation ended.

    Args:
        rewards: One an iteration.
        before: The mean score of what imitation came to.
        model: Its shape's name.
        path: Of the PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, len(rewards) + 1), rewards, marker="o", markersize=3, label=f"PPO, {model}")
    axes.axhline(before, linestyle="--", color="tab:red", label="imitation")
    axes.axhline(1.0, linestyle="--", color="tab:green", label="all in order")
    axes.set(xlabel="iteration (128 words each)", ylabel="mean score", ylim=(0.0, 1.05))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(args: list[str] | None = None) -> None:
    """Runs the example.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_rlhf.examples.seq2seq", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="t5", help="whose shape the network has")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and sampling")
    parser.add_argument("--epochs", type=int, default=4, help="of imitation")
    parser.add_argument("--iterations", type=int, default=40, help="of PPO")
    parser.add_argument("--output", type=Path, default=Path("outputs/seq2seq"), help="folder for what is left")
    options = parser.parse_args(args)
    start, final = options.output / "warm-start", options.output / "policy"

    console = Console()
    started = time.perf_counter()
    console.rule(f"1. A {options.model} imitates words in order")
    warm_start(options.model, start, options.seed, options.epochs)
    before = evaluate(SFTModule(start))
    console.rule("2. PPO: the more letters in their place, the higher the score")
    module, learnt = learn(start, options.seed, options.iterations, logger=False)
    after = evaluate(module)
    module.save_pretrained(final)
    curve = options.output / "curve.png"
    plot(learnt.rewards, before[0], options.model, curve)

    table = Table(title=f"200 unseen words, {options.model}, seed {options.seed}")
    for column in ("", "mean score", "sampled: all in order", "likeliest: all in order"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("before: imitation", *(f"{share:.3f}" for share in before))
    table.add_row("after: PPO", *(f"{share:.3f}" for share in after))
    console.print(table)
    console.print(
        f"In {time.perf_counter() - started:.0f} seconds. What is left of them:", highlight=False, soft_wrap=True
    )
    console.print(f"  {curve}  the curve", highlight=False, soft_wrap=True)
    console.print(
        f"  {final}  the policy, for `AutoModelForSeq2SeqLM.from_pretrained`", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
