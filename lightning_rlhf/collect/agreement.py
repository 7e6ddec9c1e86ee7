"""How far annotators agree, less what chance alone would give."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    r"""Cohen's coefficient for two annotators who label the same units.

    .. math:: \kappa = \frac{p_o - p_e}{1 - p_e}

    with the share of units on which both agree, :math:`p_o`, and that on which they would if each drew labels from
    their own frequencies, :math:`p_e`: eq. 1 of `A Coefficient of Agreement for Nominal Scales
    <https://doi.org/10.1177/001316446002000104>`_.

    Args:
        first: A label for each unit.
        second: Of the other annotator.

    Returns:
        1 where they always agree, 0 where as often as by chance; NaN without units, or where both only use one label.

    Example:
        >>> round(cohen_kappa("aabb", "aaba"), 3)
        0.5
    """
    total = len(first)
    if total == 0:
        return math.nan
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    others = Counter(second)
    expected = sum(count * others[label] for label, count in Counter(first).items()) / total**2
    return math.nan if expected == 1.0 else (observed - expected) / (1.0 - expected)


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float:
    r"""Krippendorff's coefficient for any number of annotators, of whom each may have labelled some units only.

    .. math::
        \alpha = \frac{(n - 1) \sum_c o_{cc} - \sum_c n_c (n_c - 1)}{n (n - 1) - \sum_c n_c (n_c - 1)},
        \quad o_{cc} = \sum_u \frac{n_{uc} (n_{uc} - 1)}{m_u - 1}

    for nominal labels: part C of `Computing Krippendorff's Alpha-Reliability
    <https://repository.upenn.edu/handle/20.500.14332/2089>`_. Unit :math:`u` has :math:`m_u` labels, :math:`n_{uc}` of
    them :math:`c`; :math:`n_c` counts label :math:`c` over all units with two labels or more, and :math:`n` all labels.

    Args:
        units: The labels that each was given.

    Returns:
        1 where all agree, 0 where as often as by chance; NaN where no unit has two labels, or all labels are alike.

    Example:
        >>> round(krippendorff_alpha(["aa", "bb", "ab", "b"]), 3)
        0.444
    """
    totals: Counter[Hashable] = Counter()
    coincidences = 0.0
    for labels in units:
        if len(labels) > 1:
            counts = Counter(labels)
            totals.update(counts)
            coincidences += sum(count * (count - 1) for count in counts.values()) / (len(labels) - 1)
    n = totals.total()
    by_chance = sum(count * (count - 1) for count in totals.values())
    return math.nan if n * (n - 1) == by_chance else ((n - 1) * coincidences - by_chance) / (n * (n - 1) - by_chance)


Units = Mapping[Hashable, Mapping[str, int]]
"""Of each unit, the labels by annotator."""


def pairwise_labels(key: str, ranks: Sequence[int]) -> Iterator[tuple[Hashable, int]]:
    """A ranking as labels of its pairs: 1 where one response is better, -1 where the other is, 0 where they tie.

    Which response of a pair is the one, and which the other, its digest says. Files often have the better response
    first; both coefficients would take that for a habit of the annotators, and agreement for chance.

    Args:
        key: Of the task.
        ranks: Places of its responses, 1 for the best.

    Yields:
        Each pair as a unit, and its label.
    """
    for i, j in itertools.combinations(range(len(ranks)), 2):
        is_turned = hashlib.sha256(f"{key}/{i}/{j}".encode()).digest()[0] & 1
        one, other = (j, i) if is_turned else (i, j)
        yield (key, i, j), (ranks[one] < ranks[other]) - (ranks[one] > ranks[other])


def kappas(units: Units) -> list[tuple[str, str, float, int]]:
    """Cohen's coefficient of every two annotators who have labelled some of the same units.

    Args:
        units: The labels.

    Returns:
        Two names, the coefficient, and on how many units it stands.
    """
    shared: defaultdict[tuple[str, str], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for labels in units.values():
        for one, other in itertools.combinations(sorted(labels), 2):
            first, second = shared[one, other]
            first.append(labels[one])
            second.append(labels[other])
    return [(*names, cohen_kappa(*labels), len(labels[0])) for names, labels in sorted(shared.items())]
