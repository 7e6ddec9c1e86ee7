"""Rows in bins, by hand."""

from lightning_rlhf.data.bins import OPEN, first_fit


def test_a_row_goes_into_the_first_bin_that_has_room_to_the_last_token():
    assert first_fit(range(5), [3, 4, 2, 5, 1], 7) == [[0, 1], [2, 3], [4]]
    assert first_fit(range(4), [5, 5, 2, 2], 7) == [[0, 2], [1, 3]]
    assert first_fit(range(3), [7, 7, 7], 7) == [[0], [1], [2]]


def test_rows_are_put_in_in_the_order_that_is_given():
    assert first_fit([3, 1, 0, 2], [2, 5, 6, 4], 7) == [[3, 0], [1], [2]]
    assert first_fit([], [2, 5], 7) == []


def test_a_bin_that_many_later_ones_have_come_after_stays_as_it_is():
    for full, last in ((OPEN - 1, [0, OPEN]), (OPEN, [0])):
        bins = first_fit(range(full + 2), [1, *[7] * full, 1], 7)
        assert bins[0] == last
        assert sorted(row for rows in bins for row in rows) == [*range(full + 2)]
