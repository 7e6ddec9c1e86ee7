import math

import pytest

from lightning_rlhf.collect.agreement import cohen_kappa, kappas, krippendorff_alpha, pairwise_labels

# `Computing Krippendorff's Alpha-Reliability`, parts A to C: the observers' rows, a point where one has seen nothing.
PUBLISHED = [
    (["0100000010", "1110010000"], 0.095),
    (["aabbdcccedda", "babbbccceddd"], 0.692),
    (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
]


def units(observers):
    return [[label for label in column if label != "."] for column in zip(*observers, strict=True)]


@pytest.mark.parametrize(("observers", "alpha"), PUBLISHED)
def test_alpha_is_what_krippendorff_published(observers, alpha):
    assert krippendorff_alpha(units(observers)) == pytest.approx(alpha, abs=5e-4)


def test_alpha_is_one_less_the_ratio_of_disagreements():
    """By its definition: what pairs of labels disagree, within units and over all."""
    labels = [[0, 0, 1], [1, 1], [0, 1, 1, 1], [2, 0], [1]]
    paired = [row for row in labels if len(row) > 1]
    everything = [label for row in paired for label in row]
    n = len(everything)
    within = sum(sum(a != b for a in row for b in row) / (len(row) - 1) for row in paired) / n
    over_all = sum(a != b for a in everything for b in everything) / (n * (n - 1))
    assert krippendorff_alpha(labels) == pytest.approx(1 - within / over_all, abs=1e-12)


def test_kappa_of_a_table_by_hand():
    # Of fifty both say yes to 20 and no to 15; p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    first = "y" * 25 + "n" * 25
    second = "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4, abs=1e-12)


def alpha_of_two(first, second):
    return krippendorff_alpha(zip(first, second, strict=True))


@pytest.mark.parametrize("coefficient", [cohen_kappa, alpha_of_two])
def test_where_chance_says_all_there_is_no_coefficient(coefficient):
    assert math.isnan(coefficient("aaa", "aaa"))
    assert math.isnan(coefficient("", ""))
    assert coefficient("aab", "aab") == 1.0


def test_units_with_one_label_count_for_nothing():
    assert krippendorff_alpha([["a", "a"], ["b", "a"], ["b", "b"], ["c"]]) == krippendorff_alpha(
        [["a", "a"], ["b", "a"], ["b", "b"]]
    )


def test_a_ranking_is_all_its_pairs():
    labels = dict(pairwise_labels("key", [2, 1, 2]))
    assert len(labels) == 3
    assert labels["key", 0, 2] == 0
    # Whichever way round a pair is read, the reverse ranking is its negative.
    reverse = dict(pairwise_labels("key", [1, 2, 1]))
    assert {unit: -label for unit, label in labels.items()} == reverse
    assert set(labels.values()) - {0} <= {-1, 1}


def test_a_file_that_has_the_better_response_first_is_no_habit_of_the_annotators():
    def alpha(wrong):
        labels = {}
        for number in range(400):
            for name in "ab":
                is_wrong = name == "a" and number % 10 in wrong
                for unit, label in pairwise_labels(str(number), [2, 1] if is_wrong else [1, 2]):
                    labels.setdefault(unit, []).append(label)
        return krippendorff_alpha(labels.values())

    assert alpha([]) == 1.0
    # They agree on nine in ten, and chance on half; read in the order of the file it would be about 0.
    assert alpha([3]) == pytest.approx(0.8, abs=0.02)


def test_every_two_annotators_are_compared_on_what_both_have_seen():
    labels = {1: {"b": 1, "a": 1}, 2: {"a": -1, "b": -1, "c": 1}, 3: {"a": 1, "b": -1}, 4: {"c": 0}}
    found = {(one, other): (kappa, units) for one, other, kappa, units in kappas(labels)}
    assert found["a", "b"] == (cohen_kappa([1, -1, 1], [1, -1, -1]), 3)
    assert found["a", "c"][1] == found["b", "c"][1] == 1
    assert len(found) == 3
