"""The random-walk task: its published numbers, brute force on its graphs, and a graph small enough for a pencil."""

import numpy as np
import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from lightning_rlhf.examples.randomwalks.task import RandomWalks


@pytest.fixture(scope="module")
def task() -> RandomWalks:
    return RandomWalks(seed=1000)


@pytest.fixture(scope="module")
def small() -> RandomWalks:
    """To the goal `a` from `b`, and to `b` from `c`; `b` also leads back to `c`."""
    return RandomWalks(seed=0, adjacency=np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]]))


def test_seed_1000_is_the_graph_of_the_published_numbers(task: RandomWalks):
    assert task.adjacency.shape == (21, 21)
    assert task.adjacency.sum() == 52
    assert len(task.walks) == 1000
    assert np.mean(task.score([walk[0] for walk in task.walks], [walk[1:] for walk in task.walks])) == pytest.approx(
        0.352, abs=5e-4
    )
    assert task.random_walk_mean() == pytest.approx(0.346, abs=5e-4)


def test_the_first_walks_are_those_that_trlx_draws(task: RandomWalks):
    # `generate_random_walks(seed=1000)` of trlX's examples/randomwalks/randomwalks.py.
    assert task.walks[:3] == ["sda", "fda", "ebjnbdtkna"]


def test_only_the_goal_leads_to_itself_and_to_nothing_else(task: RandomWalks):
    assert np.flatnonzero(task.adjacency[0]).tolist() == [0]
    assert np.flatnonzero(task.adjacency.diagonal()).tolist() == [0]
    assert task.adjacency.any(1).all()


def test_walks_follow_edges_until_the_goal_or_ten_nodes(task: RandomWalks):
    for walk in task.walks:
        steps = [(ord(here) - ord("a"), ord(there) - ord("a")) for here, there in zip(walk, walk[1:], strict=False)]
        assert all(task.adjacency[step] for step in steps)
        assert "a" not in walk[:-1]
        assert len(walk) == 10 or walk[-1] == "a"
    assert {walk[0] for walk in task.walks} == set(task.prompts) == set("bcdefghijklmnopqrstu")


@pytest.mark.parametrize("seed", [1000, 1, 2, 4])
def test_the_shortest_path_is_the_first_power_of_the_matrix_that_reaches_the_goal(seed: int):
    task = RandomWalks(seed)
    power, expected = np.eye(21, dtype=int), {}
    for edges in range(10):
        for node in np.flatnonzero(power[:, 0]):
            expected.setdefault("abcdefghijklmnopqrstu"[node], edges + 1)
        power = power @ task.adjacency
    assert task.shortest == expected


def test_the_best_of_all_walks_scores_one_from_every_start(task: RandomWalks):
    best = dict.fromkeys(task.prompts, 0.0)
    for walk, _ in every_walk(task):
        (score,) = task.score([walk[0]], [walk[1:]])
        best[walk[0]] = max(best[walk[0]], score)
    assert set(best.values()) == {1.0}


@pytest.mark.parametrize("seed", [1000, 1, 2])
def test_the_mean_of_the_random_walk_is_that_of_all_walks_by_their_probability(seed: int):
    task = RandomWalks(seed)
    walks, probabilities = zip(*every_walk(task), strict=True)
    scores = task.score([walk[0] for walk in walks], [walk[1:] for walk in walks])
    assert sum(probabilities) == pytest.approx(20, rel=1e-12)
    assert task.random_walk_mean() == pytest.approx(np.dot(scores, probabilities) / 20, rel=1e-12)


def every_walk(task: RandomWalks) -> list[tuple[str, float]]:
    """Lists the walks from all starts that a random walk may take, each with its probability."""
    done, going = [], [(prompt, 1.0) for prompt in task.prompts]
    while going:
        walk, probability = going.pop()
        if walk.endswith("a") or len(walk) == 10:
            done.append((walk, probability))
            continue
        following = [chr(ord("a") + node) for node in np.flatnonzero(task.adjacency[ord(walk[-1]) - ord("a")])]
        going += [(walk + letter, probability / len(following)) for letter in following]
    return done


@pytest.mark.parametrize(
    ("walk", "score"),
    [
        ("ba", 8 / 8),
        ("bcba", 6 / 8),
        ("bcbcbcba", 2 / 8),
        ("cba", 7 / 7),
        ("cbcba", 5 / 7),
        ("cbcbcbcba", 1 / 7),
        ("bcbcbcbcba", 0),  # the goal in the tenth place
        ("cbabbbzz", 7 / 7),  # what follows the goal does not count
        ("c", 0),
        ("cb", 0),
        ("ca", 0),  # no edge
        ("bba", 0),  # no edge, before one that leads to the goal
        ("bxa", 0),  # no node
        ("bcbcbcbcbcba", 0),  # too long
    ],
)
def test_a_walk_scores_how_near_it_came_to_the_shortest(small: RandomWalks, walk: str, score: float):
    assert small.shortest == {"a": 1, "b": 2, "c": 3}
    assert small.score(prompts=[walk[0]], responses=[walk[1:]], ids=[7]) == [score]


def test_the_mean_of_the_random_walk_on_a_small_graph_by_hand(small: RandomWalks):
    # At `b` half of the walks arrive and half lose two steps; `c` is one step further away.
    from_b = (8 / 2 + 6 / 4 + 4 / 8 + 2 / 16) / 8
    from_c = (7 / 2 + 5 / 4 + 3 / 8 + 1 / 16) / 7
    assert small.random_walk_mean() == pytest.approx((from_b + from_c) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("walk", "valid"), [("bcb", True), ("cbab", True), ("ca", False), ("bca", False), ("bx", False)]
)
def test_a_walk_is_valid_if_every_step_to_the_goal_is_an_edge(small: RandomWalks, walk: str, valid: bool):
    assert small.valid(walk) is valid


def test_a_graph_with_a_node_far_from_the_goal_is_refused():
    with pytest.raises(ValueError, match="`seed=3` draws a graph in which the goal is not within 9 nodes"):
        RandomWalks(seed=3)
    chain = np.eye(11, k=-1)
    chain[0, 0] = 1
    with pytest.raises(ValueError, match=r"`adjacency` .* of j, k: "):
        RandomWalks(adjacency=chain)


def test_every_node_is_one_token_and_decoding_adds_nothing(task: RandomWalks):
    tokenizer = task.tokenizer()
    assert tokenizer("fbca")["input_ids"] == [5, 1, 2, 0]
    assert tokenizer("abcdefghijklmnopqrstu")["input_ids"] == list(range(21))
    assert tokenizer.decode([5, 1, 2, 0]) == "fbca"
    assert tokenizer("a<eos><pad>")["input_ids"] == [0, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, *range(21)}) == len(tokenizer) == 23
    assert tokenizer.bos_token_id is None
    ended = [5, 0, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.batch_decode([ended], skip_special_tokens=True) == ["fa"]


def test_the_tokenizer_comes_back_from_a_folder(task: RandomWalks, tmp_path):
    task.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["b", "fbca"], padding=True)
    assert batch["input_ids"] == [[22, 22, 22, 1], [5, 1, 2, 0]]
    assert tokenizer.decode([5, 1, 2, 0]) == "fbca"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")


def test_the_network_is_trlxs(task: RandomWalks):
    config, tokenizer = task.config(), task.tokenizer()
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    width, positions = 144, 1024
    block = 12 * width**2 + 13 * width  # four width x width and two width x 4 width, their biases, two layer norms
    expected = (len(tokenizer) + positions) * width + 6 * block + 2 * width
    assert sum(weight.numel() for weight in GPT2LMHeadModel(config).parameters()) == expected == 1_655_280
