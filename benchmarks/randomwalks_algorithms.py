"""Random walks by PPO, PPO on the top layers and GRPO: one table and one plot, of score against episodes and seconds.

For every seed all of them start from the same imitation and learn from at most 2,800 episodes. The curves are the mean
scores of the episodes of an iteration, before it learns from them, or of as many iterations as have all of the starts;
the table ends with scores taken afterwards.
Run it with::

    python -m benchmarks.randomwalks_algorithms
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import plain_ppo
from benchmarks.curves import band, picture
from benchmarks.randomwalks import be_quiet, warm_start
from lightning_rlhf.examples.randomwalks.task import RandomWalks
from lightning_rlhf.examples.randomwalks.training import RECIPES, Recipe, learn

MILESTONES = (700, 1400, 2100)
"""Episodes after which the table looks at the curves."""


@dataclass
class Runs:
    """What one recipe came to, over seeds.

    Attributes:
        recipe: The recipe.
        episodes: So far, whenever all starts have been learnt from, (point,).
        seconds: Likewise, (seed, point).
        rewards: Mean score of the episodes since the point before, (seed, point).
        sampled: Mean score of 64 samples a start, afterwards, (seed,).
        greedy: Mean score of the likeliest walk from each start, afterwards, (seed,).
    """

    recipe: Recipe
    episodes: Tensor
    seconds: Tensor
    rewards: Tensor
    sampled: Tensor
    greedy: Tensor


def run_all(task: RandomWalks, seeds: list[int], names: list[str]) -> list[Runs]:
    """Runs every recipe from every seed's imitation.

    Args:
        task: The graph.
        seeds: Of imitation and learning.
        names: Of the recipes.

    Returns:
        What each recipe came to.
    """
    results: dict[str, list[tuple[list[float], list[float], float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            start = Path(folder) / str(seed)
            warm_start(task, start, seed)
            for name in names:
                module, curve = learn(task, start, seed, RECIPES[name], logger=False, enable_progress_bar=False)
                sampled, greedy = plain_ppo.evaluate(module.policy.decoder.model.eval(), task)
                results[name].append((curve.rewards, curve.seconds, sampled, greedy))
                print(f"seed {seed}, {name}: {sampled:.3f} | {greedy:.3f} | {curve.seconds[-1]:.1f} s", flush=True)
    return [_runs(RECIPES[name], len(task.prompts), results[name]) for name in names]


def _runs(recipe: Recipe, starts: int, results: list[tuple[list[float], list[float], float, float]]) -> Runs:
    rewards, seconds, sampled, greedy = (torch.tensor(column) for column in zip(*results, strict=True))
    per_point = max(1, starts // recipe.prompts)  # iterations, without which a curve shows how hard their starts are
    points = rewards.shape[1] // per_point
    episodes = recipe.episodes * per_point * torch.arange(1, points + 1)
    means = rewards[:, : points * per_point].unflatten(1, (points, per_point)).mean(2)
    return Runs(recipe, episodes, seconds[:, per_point - 1 :: per_point], means, sampled, greedy)


def table_of(runs: list[Runs], title: str) -> Table:
    """A row a recipe: means over seeds, and the lowest seed in brackets.

    Args:
        runs: The rows.
        title: Of the table.

    Returns:
        The table.
    """
    table = Table(title=title)
    table.add_column("")
    for column in (*(f"at {n:,}" for n in MILESTONES), "episodes", "64 samples a start", "likeliest walk", "seconds"):
        table.add_column(column, justify="right")
    for run in runs:
        reached = [run.rewards[:, int((run.episodes >= n).nonzero()[0])].mean() for n in MILESTONES]
        table.add_row(
            run.recipe.name,
            *(f"{float(reward):.3f}" for reward in reached),
            f"{int(run.episodes[-1]):,}",
            *(f"{float(score.mean()):.3f} ({float(score.min()):.3f})" for score in (run.sampled, run.greedy)),
            f"{float(run.seconds[:, -1].mean()):.1f}",
        )
    return table


def plot(runs: list[Runs], floor: float, path: Path) -> None:
    """Draws the curves, a mean over seeds in a band from the lowest to the highest.

    Args:
        runs: The curves.
        floor: What random walks score.
        path: Of the PNG.
    """
    with picture(path, nrows=1, ncols=2, figsize=(10, 4), sharey=True) as (left, right):
        for run in runs:
            for axes, x in ((left, run.episodes), (right, run.seconds.mean(0))):
                band(axes, x, run.rewards, run.recipe.name)
        for axes, label in ((left, "episodes"), (right, "seconds, loading included")):
            axes.axhline(floor, linestyle="--", color="tab:gray", label="random walks")
            axes.set(xlabel=label, ylim=(0.0, 1.02))
        left.set_ylabel("mean score of the episodes")
        right.legend(loc="lower right")


def main(args: list[str] | None = None) -> None:
    """Prints the table, and writes the plot.

    Args:
        args: Of the command line.
    """
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.randomwalks_algorithms", description=description)
    parser.add_argument("--graph-seed", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--algorithms", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, default=Path("outputs/randomwalks-algorithms.png"), help="the plot")
    options = parser.parse_args(args)
    be_quiet()
    torch.set_num_threads(options.threads)
    task = RandomWalks(options.graph_seed)
    runs = run_all(task, options.seeds, options.algorithms)
    title = f"Random walks, graph {task.seed}: mean over seeds {', '.join(map(str, options.seeds))} (the lowest)"
    console = Console(width=max(120, Console().width))
    console.print(table_of(runs, title))
    plot(runs, task.random_walk_mean(), options.output)
    console.print(f"The curves: {options.output}")


if __name__ == "__main__":
    main()
