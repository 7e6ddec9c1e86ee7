"""Random walks: this library beside a plain PPO loop over transformers' `generate`, in one run.

From the same warm start and with the same seeds, three runs in turn: the plain loop with trlX's hyper-parameters, this
library with the same, and this library with the example's own. All are scored by the same code. Run it with::

    python -m benchmarks.randomwalks
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import plain_ppo
from lightning_rlhf.examples.randomwalks.task import RandomWalks
from lightning_rlhf.examples.randomwalks.training import OWN, TRLX, Recipe, learn

Run = Callable[[Path, int], tuple[transformers.PreTrainedModel, float]]


def warm_start(task: RandomWalks, folder: Path, seed: int) -> transformers.GPT2LMHeadModel:
    """What every run of a seed starts from, and leaves it in a folder."""
    model = plain_ppo.warm_start(task, seed)
    model.save_pretrained(folder)
    task.tokenizer().save_pretrained(folder)
    return model


def plain(task: RandomWalks) -> Run:
    """The plain loop, and the seconds from the loading of the warm start to the end of training."""

    def run(start: Path, seed: int) -> tuple[transformers.PreTrainedModel, float]:
        started = time.perf_counter()
        model = transformers.GPT2LMHeadModel.from_pretrained(start)
        plain_ppo.train(model, task, seed)
        return model, time.perf_counter() - started

    return run


def ours(task: RandomWalks, recipe: Recipe) -> Run:
    """This library, and the seconds from the module's making to the end of ``fit``, loading and probing included."""

    def run(start: Path, seed: int) -> tuple[transformers.PreTrainedModel, float]:
        started = time.perf_counter()
        module, _ = learn(task, start, seed, recipe, logger=False, enable_progress_bar=False)
        return module.policy.decoder.model.eval(), time.perf_counter() - started

    return run


def be_quiet() -> None:
    """Leaves the table to speak."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(args: list[str] | None = None) -> None:
    """Prints a table: sampled and greedy score and seconds of each run, and their means.

    Args:
        args: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.randomwalks", description=__doc__.splitlines()[0])
    parser.add_argument("--graph-seed", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch")
    options = parser.parse_args(args)
    be_quiet()
    torch.set_num_threads(options.threads)

    task = RandomWalks(options.graph_seed)
    runs = {
        "plain loop": plain(task),
        "ours, trlX's recipe": ours(task, TRLX),
        "ours, own recipe": ours(task, OWN),
    }
    table = Table(title=f"Random walks, graph {task.seed}: 64 samples a start | greedy | seconds")
    for column in ("seed", "before", *runs):
        table.add_column(column, justify="right")
    rows: list[list[tuple[float, float, float]]] = []
    befores = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            start = Path(folder) / str(seed)
            model = warm_start(task, start, seed)
            befores.append(plain_ppo.evaluate(model, task)[0])
            results = []
            for name, run in runs.items():
                trained, seconds = run(start, seed)
                results.append((*plain_ppo.evaluate(trained, task), seconds))
                print(f"seed {seed}, {name}: {results[-1][0]:.3f} | {results[-1][1]:.3f} | {seconds:.1f} s", flush=True)
            rows.append(results)
            table.add_row(str(seed), f"{befores[-1]:.3f}", *(_cell(result) for result in results))
    means = torch.tensor(rows).mean(0).tolist()
    table.add_section()
    table.add_row("mean", f"{sum(befores) / len(befores):.3f}", *(_cell(mean) for mean in means))
    lowest = torch.tensor(rows).amin(0).tolist()
    table.add_row("lowest", "", *(f"{low[0]:.3f} | {low[1]:.3f} |     " for low in lowest))
    console = Console(width=max(100, Console().width))
    console.print(table)
    for i, name in list(enumerate(runs))[1:]:
        ratios = torch.tensor([result[0][2] / result[i][2] for result in rows])
        console.print(f"{name}: {float(ratios.median()):.2f} times the plain loop's speed, median over seeds")
    console.print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads")


def _cell(result: tuple[float, float, float] | list[float]) -> str:
    sampled, greedy, seconds = result
    return f"{sampled:.3f} | {greedy:.3f} | {seconds:4.1f}"


if __name__ == "__main__":
    main()
