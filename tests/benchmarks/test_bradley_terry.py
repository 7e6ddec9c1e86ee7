"""Comparisons whose truth is known, and the oracle that knows it."""

import pytest
import torch

from benchmarks import bradley_terry


def test_what_is_preferred_is_drawn_with_the_odds_that_are_told():
    table = bradley_terry.worth_table(3)
    rows, odds = bradley_terry.comparisons(4000, table, 5)

    def worth(prompt, response):
        letters = response.split()
        topic = table[bradley_terry.TOPICS.index(prompt)]
        return bradley_terry.SPREAD * sum(float(topic[ord(x) - ord("a")]) for x in letters) / len(letters) ** 0.5

    expected = [worth(row["prompt"], row["chosen"]) - worth(row["prompt"], row["rejected"]) for row in rows]
    assert odds.tolist() == pytest.approx(expected, abs=1e-4)
    # The likelier of two wins as often as its odds say.
    assert float((odds > 0).float().mean()) == pytest.approx(float(odds.abs().sigmoid().mean()), abs=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_oracle_is_right_and_calibrated_and_a_model_that_learnt_little_is_less_so():
    torch.manual_seed(0)
    found = bradley_terry.measure(pairs=400, held_out=4000, epochs=1, batch_size=50, seed=0)
    accuracy, error = found["oracle"]
    assert accuracy == pytest.approx(0.8, abs=0.03)
    assert error < 0.03
    assert 0.45 < found["reward model"][0] < accuracy
