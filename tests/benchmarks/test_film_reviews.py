"""Reviews are set apart and matched as they should be."""

import pytest

from benchmarks import film_reviews
from lightning_rlhf.examples.film_reviews.reviews import Reviews


def test_reviews_are_split_without_overlap():
    reviews = Reviews([f"text {i}" for i in range(1, 20, 2)], [f"text {i}" for i in range(0, 20, 2)])
    learn, held_out = film_reviews.split(reviews, 3, seed=0)
    assert film_reviews.split(reviews, 3, seed=0) == (learn, held_out)
    assert film_reviews.split(reviews, 3, seed=1) != (learn, held_out)
    for some, rest, everything in zip(held_out, learn, reviews, strict=True):
        assert (len(some), sorted([*some, *rest])) == (3, sorted(everything))


def test_every_review_is_in_one_pair_of_a_round():
    reviews = Reviews(["p1", "p2", "p3"], ["n1", "n2", "n3", "n4"])
    pairs = film_reviews.matched(reviews, 20, seed=0)
    assert len(pairs) == 60
    for start in range(0, 60, 3):
        better, worse = zip(*pairs[start : start + 3], strict=True)
        assert sorted(better) == ["p1", "p2", "p3"]
        assert len(set(worse) & set(reviews.negative)) == 3
    assert len(set(pairs)) == 12
    assert film_reviews.rows([("a b c", "d")], 2) == [
        {"prompt": film_reviews.PROMPT, "chosen": " b c", "rejected": " d"}
    ]


def test_equal_scores_are_right_by_half():
    assert film_reviews.share_right([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == pytest.approx(2.5 / 4)
