"""From random walks to shortest ones in a minute or two on a laptop: imitation, PPO or GRPO, a table and a curve."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from lightning_rlhf import SFTModule
from lightning_rlhf.callbacks import RewardLogger
from lightning_rlhf.examples.randomwalks.task import RandomWalks
from lightning_rlhf.examples.randomwalks.training import RECIPES, evaluate, learn, warm_start
from lightning_rlhf.examples.runs import plot


def main(args: list[str] | None = None) -> None:
    """Runs the example.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_rlhf.examples.randomwalks", description=__doc__)
    parser.add_argument("--algorithm", choices=RECIPES, default="ppo", help="what learns after the imitation")
    parser.add_argument("--graph-seed", type=int, default=1000, help="which graph")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and sampling")
    parser.add_argument("--epochs", type=int, default=10, help="of imitation")
    parser.add_argument("--iterations", type=int, help="of the algorithm; its recipe's by default")
    parser.add_argument("--output", type=Path, default=Path("outputs/randomwalks"), help="folder for what is left")
    options = parser.parse_args(args)
    recipe = RECIPES[options.algorithm]

    console = Console()
    task = RandomWalks(options.graph_seed)
    start, final = options.output / "warm-start", options.output / "policy"
    started = time.perf_counter()

    console.rule("1. Imitating 1,000 random walks")
    warm_start(task, start, options.seed, options.epochs)
    before = evaluate(SFTModule(start), task)

    console.rule(f"2. {recipe.name}: the shorter the walk to `a`, the higher the score")
    logger = TensorBoardLogger(options.output, name="logs", default_hp_metric=False)
    module, learnt = learn(
        task, start, options.seed, recipe, options.iterations, logger=logger, callbacks=[RewardLogger()]
    )
    after = evaluate(module, task)
    module.save_pretrained(final)
    curve = options.output / "curve.png"
    levels = {"shortest walks": 1.0, "random walks": task.random_walk_mean()}
    plot({recipe.name: learnt.rewards}, recipe.episodes, levels, curve)

    episodes = recipe.episodes * len(learnt.rewards)
    table = Table(title=f"Score on graph {task.seed} after {episodes:,} episodes, seed {options.seed}")
    table.add_column("")
    table.add_column("64 samples a start", justify="right")
    table.add_column("likeliest walk", justify="right")
    table.add_row("floor: random walks", f"{task.random_walk_mean():.3f}", "")
    table.add_row("before: imitation", *(f"{score:.3f}" for score in before))
    table.add_row(f"after: {recipe.name}", *(f"{score:.3f}" for score in after))
    table.add_row("ceiling: shortest walks", "1.000", "1.000")
    console.print(table)
    console.print(
        f"In {time.perf_counter() - started:.0f} seconds. What is left of them:", highlight=False, soft_wrap=True
    )
    console.print(f"  {curve}  the curve", highlight=False, soft_wrap=True)
    console.print(f"  {logger.log_dir}  for `tensorboard --logdir {logger.log_dir}`", highlight=False, soft_wrap=True)
    console.print(f"  {final}  the policy, for `AutoModelForCausalLM.from_pretrained`", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
