"""The sorting task, by hand and by brute force; the example from end to end, short, and whether its networks learn."""

import itertools

import numpy as np
import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lightning_rlhf.examples.seq2seq.__main__ import main
from lightning_rlhf.examples.seq2seq.task import SHAPES, SLIP, Sorting, sort_carelessly
from lightning_rlhf.examples.seq2seq.training import EPISODES, ITERATIONS, learn, warm_start


@pytest.fixture(scope="module")
def task() -> Sorting:
    return Sorting()


def test_words_are_dealt_to_one_use_each_and_suffice(task):
    demonstrated = [row["prompt"] for row in task.demonstrations]
    words = [*task.held_out, *demonstrated, *task.prompts]
    assert len(words) == len(set(words)) == sum(len(list(itertools.permutations(range(8), n))) for n in (3, 4, 5, 6))
    assert (len(task.held_out), len(demonstrated)) == (500, 4000)
    assert len(task.prompts) >= ITERATIONS * EPISODES
    assert all(sorted(row["prompt"]) == sorted(row["response"]) for row in task.demonstrations)
    assert Sorting(1).held_out != task.held_out == Sorting(0).held_out


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("abh", 3 / 3),
        ("bah", 1 / 3),
        ("hab", 0 / 3),
        ("abhh", 3 / 4),
        ("ab", 2 / 3),
        ("", 0 / 3),
        ("hhabh", 0 / 5),
    ],
)
def test_a_word_scores_the_places_in_which_it_is_sorted(task, response, score):
    assert task.score(["hab"], [response], ids=[7]) == [score]


def test_a_careless_writer_slips_three_times_in_four(task):
    """By all orders of three letters and their probabilities: two choices with a slip, then one without."""
    first, second = (1 - SLIP, SLIP / 2, SLIP / 2), (1 - SLIP, SLIP)
    chance = {}
    for i, j in itertools.product(range(3), range(2)):
        left = list("abc")
        word = left.pop(i) + left.pop(j) + left[0]
        chance[word] = first[i] * second[j]
    generator = np.random.default_rng(0)
    written = [sort_carelessly("cab", generator) for _ in range(20_000)]
    assert sum(chance.values()) == pytest.approx(1.0)
    for word, probability in chance.items():
        assert written.count(word) / len(written) == pytest.approx(probability, abs=0.01)  # three deviations
    short = [row for row in task.demonstrations if len(row["prompt"]) == 3]
    scores = task.score(*zip(*((row["prompt"], row["response"]) for row in short), strict=True))
    expected = sum(p * np.mean([a == b for a, b in zip(word, "abc", strict=True)]) for word, p in chance.items())
    assert np.mean(scores) == pytest.approx(expected, abs=0.15)  # of fifty words


def test_the_networks_are_of_the_two_shapes(task):
    assert [task.config(shape).model_type for shape in SHAPES] == list(SHAPES)
    with pytest.raises(ValueError, match="`shape='gpt2'` must be 't5' or 'bart'"):
        task.config("gpt2")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_example_leaves_a_table_curves_logs_and_policies(tmp_path, capsys):
    main(["--epochs", "1", "--iterations", "2", "--seeds", "3", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for shape in SHAPES:
        assert f"{shape}, seed 3: PPO" in printed
        assert list((tmp_path / f"{shape}-3" / "logs").rglob("events.*"))
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"{shape}-3" / "policy")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"{shape}-3" / "policy")
        tokens = model.generate(**tokenizer(["hab"], return_tensors="pt"), max_new_tokens=3, do_sample=False)
        assert set(tokenizer.decode(tokens[0], skip_special_tokens=True)) <= set("abcdefgh")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_both_shapes_learn_from_the_score_what_imitation_did_not_teach(task, shape, tmp_path):
    """Half of the example's iterations."""
    warm_start(task, shape, tmp_path, 0, enable_progress_bar=False)
    _, curve = learn(task, tmp_path, 0, ITERATIONS // 2, logger=False, enable_progress_bar=False)
    assert curve.rewards[0] < 0.25
    assert np.mean(curve.rewards[-2:]) > 0.6
