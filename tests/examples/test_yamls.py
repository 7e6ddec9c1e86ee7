"""Every example YAML is read, built and run, on small limits."""

from pathlib import Path

import pytest
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.examples.randomwalks.parts import Starts
from lightning_rlhf.examples.randomwalks.task import RandomWalks
from lightning_rlhf.examples.randomwalks.training import RECIPES
from lightning_rlhf.examples.seq2seq import parts
from lightning_rlhf.examples.seq2seq.training import ARGUMENTS, EPISODES, EPOCHS, ITERATIONS, SAMPLING
from tests.networks import network

EXAMPLES = Path(__file__).parents[2] / "examples"
# Networks that are planned and would not fit here, and stages that another test runs one after the other.
ELSEWHERE = ("plans", "film_reviews")
YAMLS = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name not in ELSEWHERE)
# What a YAML begins from, if an example is to write it first.
FOLDERS = {
    "outputs/randomwalks/warm-start": lambda: (tiny_walker(), RandomWalks().tokenizer()),
    "outputs/seq2seq/warm-start": lambda: (parts.t5(), parts.tokenizer()),
}


def tiny_walker():
    config = RandomWalks().config()
    config.n_layer, config.n_embd = 2, 24
    return config


def test_there_are_yamls():
    names = {path.relative_to(EXAMPLES).as_posix() for path in YAMLS}
    assert {f"randomwalks/{name}.yaml" for name in ("sft", "ppo", "grpo")} <= names


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_random_walks_are_learnt_by_the_recipe_of_the_demo(name):
    recipe = RECIPES[name]
    run = yaml.safe_load((EXAMPLES / "randomwalks" / f"{name}.yaml").read_text())
    arguments = run["model"]["init_args"]
    optimizer = {**arguments.pop("optimizer")["init_args"]}
    assert run["model"]["class_path"] == recipe.algorithm.__name__
    assert {**optimizer, "betas": tuple(optimizer["betas"])} == recipe.arguments["optimizer"].keywords
    others = {name: value for name, value in recipe.arguments.items() if name != "optimizer"}
    assert {key: arguments[key] for key in others} == others
    assert set(arguments) - set(others) == {"policy", "reward", "metric_fn", "sampling", "evaluation_sampling"}
    data = Starts(**run["data"].get("init_args", {}))
    assert len(data.rows) == recipe.iterations * recipe.prompts
    assert data.batch_size == recipe.prompts


def test_sorting_is_learnt_as_by_the_command_of_the_example():
    imitation, run = (yaml.safe_load((EXAMPLES / "seq2seq" / f"{name}.yaml").read_text()) for name in ("sft", "ppo"))
    assert imitation["trainer"]["max_epochs"] == EPOCHS
    arguments = run["model"]["init_args"]
    optimizer = arguments.pop("optimizer")["init_args"]
    assert {**optimizer, "betas": tuple(optimizer["betas"])} == ARGUMENTS["optimizer"].keywords
    assert {name: arguments[name] for name in ARGUMENTS if name != "optimizer"} == {
        name: value for name, value in ARGUMENTS.items() if name != "optimizer"
    }
    assert arguments["sampling"] == SAMPLING
    words = parts.Words()
    assert len(words.rows) == ITERATIONS * EPISODES
    assert words.batch_size == EPISODES


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_an_example_runs_as_it_is_written(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = yaml.safe_load(path.read_text())
    policy = run["model"]["init_args"]["policy"]
    if str(policy) in FOLDERS:
        config, tokenizer = FOLDERS[policy]()
        network(config).save_pretrained(policy)
        tokenizer.save_pretrained(policy)
    limits = [
        "max_epochs=1",
        "limit_train_batches=1",
        "limit_val_batches=1",
        "num_sanity_val_steps=0",
        "accelerator=cpu",
    ]
    limits += ["devices=1", "enable_progress_bar=false", "enable_model_summary=false", "val_check_interval=1.0"]
    main(["fit", "--config", str(path), *(f"--trainer.{limit}" for limit in limits)])
    assert (tmp_path / run["save_pretrained"] / "config.json").is_file()
    (saved,) = tmp_path.rglob("lightning_logs/version_0/config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["class_path"].endswith(run["model"]["class_path"])
