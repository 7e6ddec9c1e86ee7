import pytest
import torch

from lightning_rlhf.modules.ranks import agree, gather_over_ranks, most_over_ranks, rank, sum_over_ranks, world_size

CPU = torch.device("cpu")


def of_three(monkeypatch, *others):
    """Two more processes that say a number, or (failed, rows) and what if they failed."""
    said = ["no cats" if isinstance(other, list) and other[0] else None for other in others]
    monkeypatch.setattr("lightning_rlhf.modules.ranks.gather_objects", lambda mine: [mine, *said])
    monkeypatch.setattr(
        "lightning_rlhf.modules.ranks.gather_over_ranks",
        lambda mine: torch.stack([mine, *(torch.tensor(other) for other in others)]),
    )


def test_a_process_alone_is_the_first_of_one():
    x = torch.tensor([1.0, 2.0])
    assert (rank(), world_size()) == (0, 1)
    assert sum_over_ranks(x).tolist() == [1.0, 2.0]
    assert gather_over_ranks(x).tolist() == [[1.0, 2.0]]
    assert most_over_ranks(3, CPU) == 3
    assert agree(None, "the reward", 5, CPU) == 5


def test_all_know_who_has_most_rows(monkeypatch):
    of_three(monkeypatch, [0, 7], [0, 2])
    assert agree(None, "the reward", 5, CPU) == 7


def test_the_largest_number_is_known_to_all(monkeypatch):
    of_three(monkeypatch, 7, 2)
    assert most_over_ranks(5, CPU) == 7
    assert most_over_ranks(9, CPU) == 9


@pytest.mark.invariant(39)
def test_an_error_elsewhere_stops_this_process_too_and_says_where(monkeypatch):
    of_three(monkeypatch, [1, 7], [1, 2])
    with pytest.raises(RuntimeError, match="^`reward` 'cats' failed on rank 1: no cats; rank 2: no cats$"):
        agree(None, "`reward` 'cats'", 5, CPU)


@pytest.mark.invariant(39)
def test_an_error_here_is_raised_as_it_is_once_the_others_know(monkeypatch):
    told = []
    of_three(monkeypatch, [0, 7], [0, 2])
    monkeypatch.setattr("lightning_rlhf.modules.ranks.gather_objects", told.append)
    error = ValueError("mine")
    with pytest.raises(ValueError, match="^mine$") as raised:
        agree(error, "the reward", 5, CPU)
    assert raised.value is error
    assert told == ["ValueError: mine"]
