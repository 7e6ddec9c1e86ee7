"""A T5 and a BART learn to sort letters, in a few minutes on a laptop: imitation, PPO, a table and curves."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from lightning_rlhf import SFTModule
from lightning_rlhf.callbacks import RewardLogger
from lightning_rlhf.examples.runs import plot
from lightning_rlhf.examples.seq2seq.task import SHAPES, Sorting
from lightning_rlhf.examples.seq2seq.training import EPISODES, EPOCHS, ITERATIONS, evaluate, learn, warm_start


def main(args: list[str] | None = None) -> None:
    """Runs the example.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_rlhf.examples.seq2seq", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which networks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights, order and sampling")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of imitation")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of PPO")
    parser.add_argument("--output", type=Path, default=Path("outputs/seq2seq"), help="folder for what is left")
    options = parser.parse_args(args)

    console = Console()
    task = Sorting()
    table = Table(
        title=f"Score of {len(task.held_out)} held-out words after {options.iterations * EPISODES:,} episodes"
    )
    for column in ("", "seed", "imitation, sampled", "likeliest", "PPO, sampled", "likeliest", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    curves = {}
    for shape in options.shapes:
        for seed in options.seeds:
            folder = options.output / f"{shape}-{seed}"
            started = time.perf_counter()
            console.rule(f"{shape}, seed {seed}: imitating a careless writer")
            warm_start(task, shape, folder / "warm-start", seed, options.epochs)
            before = evaluate(SFTModule(folder / "warm-start"), task)
            console.rule(f"{shape}, seed {seed}: PPO")
            logger = TensorBoardLogger(folder, name="logs", default_hp_metric=False)
            module, curve = learn(
                task, folder / "warm-start", seed, options.iterations, logger=logger, callbacks=[RewardLogger()]
            )
            after = evaluate(module, task)
            module.save_pretrained(folder / "policy")
            curves[f"{shape}, seed {seed}"] = curve.rewards
            seconds = time.perf_counter() - started
            table.add_row(shape, str(seed), *(f"{score:.3f}" for score in (*before, *after)), f"{seconds:.0f}")
    levels = {"sorted": 1.0, "demonstrations": task.demonstrated()}
    plot(curves, EPISODES, levels, options.output / "curve.png")
    console.print(table)
    console.print(f"The demonstrations score {task.demonstrated():.3f}. What is left:", highlight=False, soft_wrap=True)
    console.print(f"  {options.output / 'curve.png'}  the curves", highlight=False, soft_wrap=True)
    console.print(
        f"  {options.output}/*/policy  the policies, for `AutoModelForSeq2SeqLM.from_pretrained`",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
