import pytest
from torch.utils.data import DistributedSampler

from lightning_rlhf.data.cursor import Cursor, CursorSampler


def order(rows=10, epoch=0, position=0, batch_size=3, shuffle=True, seed=0, world_size=1, rank=0):
    cursor = Cursor(epoch, position)
    return list(CursorSampler(range(rows), cursor, batch_size, shuffle, seed, world_size, rank))


def test_every_row_comes_once_a_pass():
    for epoch in range(3):
        assert sorted(order(epoch=epoch)) == list(range(10))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    sampler = CursorSampler(range(10), Cursor(), 3, True, 0, 1, 0)
    first = list(sampler)
    assert first == list(sampler) == order()
    sampler.set_epoch(5)  # Lightning's
    assert list(sampler) == first
    orders = {tuple(order(epoch=epoch, seed=seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert first != sorted(first)


def test_without_shuffling_rows_come_as_they_are_in_every_pass():
    assert order(shuffle=False, epoch=4) == list(range(10))


def test_the_cursor_is_read_when_a_pass_begins():
    cursor = Cursor()
    sampler = CursorSampler(range(10), cursor, 3, True, 0, 1, 0)
    first = list(sampler)
    cursor.epoch, cursor.position = 0, 2
    assert list(sampler) == first[6:]
    cursor.epoch, cursor.position = 1, 0
    assert list(sampler) == order(epoch=1)


@pytest.mark.invariant(36)
def test_a_pass_goes_on_after_the_batches_that_were_consumed():
    for position in range(4):
        assert order(position=position) == order()[3 * position :]


@pytest.mark.invariant(37)
@pytest.mark.parametrize(("rows", "world_size"), [(10, 2), (10, 3), (10, 4), (3, 4), (1, 3)])
def test_rows_are_dealt_to_ranks_as_torch_deals_them(rows, world_size):
    for rank in range(world_size):
        torchs = DistributedSampler(range(rows), num_replicas=world_size, rank=rank, shuffle=False)
        assert order(rows, shuffle=False, world_size=world_size, rank=rank) == list(torchs)
        assert len(order(rows, world_size=world_size, rank=rank)) == len(torchs)


@pytest.mark.invariant(37)
def test_the_ranks_together_read_what_one_process_reads():
    both = [order(world_size=2, rank=rank, epoch=1) for rank in range(2)]
    assert [row for pair in zip(*both, strict=True) for row in pair] == order(epoch=1)


@pytest.mark.invariant(36)
def test_every_rank_goes_on_after_its_own_batches():
    for rank in range(2):
        whole = order(world_size=2, rank=rank, batch_size=2)
        assert order(world_size=2, rank=rank, batch_size=2, position=1) == whole[2:]


def test_the_cursor_counts_batches_and_passes():
    cursor = Cursor()
    places = []
    for _ in range(5):
        cursor.advance(2)
        places.append((cursor.epoch, cursor.position))
    assert places == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_place_beyond_the_end_of_a_pass_wraps():
    cursor = Cursor(epoch=3, position=7)
    cursor.advance(4)
    assert (cursor.epoch, cursor.position) == (4, 0)
