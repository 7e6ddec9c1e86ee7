import dataclasses

import pytest
import torch

from benchmarks import randomwalks_algorithms
from lightning_rlhf.examples.randomwalks import training
from lightning_rlhf.examples.randomwalks.task import RandomWalks
from lightning_rlhf.examples.randomwalks.training import RECIPES, learn


@pytest.fixture
def short(monkeypatch):
    """Every recipe with two iterations, from networks that imitated nothing."""
    for name, recipe in RECIPES.items():
        monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, iterations=2))
    monkeypatch.setattr(randomwalks_algorithms, "MILESTONES", (70,))
    monkeypatch.setattr("benchmarks.plain_ppo.warm_start", lambda task, seed: untrained(task))


def untrained(task):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(task.config())


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_takes_more_than_2800_episodes_and_all_starts_get_as_many(name):
    recipe = RECIPES[name]
    assert 2700 <= recipe.iterations * recipe.episodes <= 2800
    assert recipe.iterations * recipe.prompts % 20 == 0


@pytest.mark.parametrize(("name", "trains"), [("ppo", 80), ("ppo-top-layers", 30), ("ppo-lora", 52), ("grpo", 76)])
def test_recipes_train_what_they_say(name, trains, short, tmp_path):
    """A block of GPT-2 has 12 tensors (4 layers of which get 2 each), its norm 2, its embeddings 2, a value head 4."""
    task = RandomWalks(1)
    untrained(task).save_pretrained(tmp_path)
    task.tokenizer().save_pretrained(tmp_path)
    module, curve = learn(task, tmp_path, 0, RECIPES[name], logger=False, enable_progress_bar=False)
    assert sum(parameter.requires_grad for parameter in module.policy.parameters()) == trains
    assert len(curve.rewards) == len(curve.seconds) == 2
    assert 0 < curve.seconds[0] < curve.seconds[1]
    assert module.reference is None


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_comparison_leaves_a_table_and_a_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(randomwalks_algorithms, "be_quiet", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    path = tmp_path / "plots" / "curves.png"
    randomwalks_algorithms.main(["--seeds", "3", "--graph-seed", "1", "--output", str(path)])
    printed = capsys.readouterr().out
    for recipe in RECIPES.values():
        assert recipe.name in printed
    assert "mean over seeds 3" in printed
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_numbers_of_the_table_are_means_over_seeds_with_the_lowest_beside_them():
    recipe = dataclasses.replace(training.GRPO, iterations=3, prompts=100, name="mine")
    runs = randomwalks_algorithms._runs(
        recipe, 20, [([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 0.5, 0.75), ([0.3, 0.4, 0.7], [1.0, 2.0, 5.0], 0.75, 0.25)]
    )
    (row,) = zip(*(column._cells for column in randomwalks_algorithms.table_of([runs], "").columns), strict=True)
    # 700 episodes an iteration: 0.2, 0.3 and 0.5 are the means of the three.
    assert row == ("mine", "0.200", "0.300", "0.500", "2,100", "0.625 (0.500)", "0.500 (0.250)", "4.0")


def test_a_curve_has_a_point_where_all_starts_have_been_learnt_from():
    recipe = dataclasses.replace(training.GRPO, iterations=4, prompts=10)
    runs = randomwalks_algorithms._runs(recipe, 20, [([0.25, 0.75, 0.5, 1.0], [1.0, 2.0, 3.0, 4.0], 0.5, 0.5)])
    assert runs.rewards.tolist() == [[0.5, 0.75]]
    assert runs.episodes.tolist() == [140, 280]
    assert runs.seconds.tolist() == [[2.0, 4.0]]
