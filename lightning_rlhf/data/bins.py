"""Rows of different lengths in bins of one size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OPEN = 32
"""Bins that are looked at for every row; what has not been filled by so many later ones stays as it is."""


def first_fit(order: Iterable[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Puts every row into the first bin that has room for it.

    Args:
        order: Numbers of the rows, in the order in which they are put in.
        lengths: Of all rows.
        size: Of a bin; no row is longer.

    Returns:
        Row numbers, bin by bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for row in order:
        first = max(0, len(bins) - OPEN)
        fits = (i for i in range(first, len(bins)) if room[i] >= lengths[row])
        found = next(fits, None)
        if found is None:
            found = len(bins)
            bins.append([])
            room.append(size)
        bins[found].append(row)
        room[found] -= lengths[row]
    return bins
