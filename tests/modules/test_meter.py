import statistics

import pytest
import torch

from lightning_rlhf.modules.meter import Meter


@pytest.mark.invariant(40)
def test_a_mean_is_the_sum_over_the_count_and_not_a_mean_of_means():
    meter = Meter()
    meter.add("x", torch.tensor([1.0, 2.0, 3.0]))
    meter.add("x", torch.tensor([[10.0]]))
    reduced = meter.reduce()["x"]
    assert reduced.mean == 4.0
    assert reduced.std == pytest.approx(statistics.stdev([1, 2, 3, 10]), rel=1e-12)


@pytest.mark.invariant(8, 40)
def test_what_is_masked_does_not_count_whatever_it_holds():
    meter = Meter()
    meter.add("x", torch.tensor([[1.0, float("nan")], [5.0, 7.0]]), torch.tensor([[True, False], [True, False]]))
    meter.add("x", torch.tensor([float("inf")]), torch.tensor([False]))
    assert meter.reduce()["x"].mean == 3.0


def test_booleans_and_whole_numbers_are_counted_too():
    meter = Meter()
    meter.add("share", torch.tensor([True, False, False, True]))
    meter.add("length", torch.tensor([1, 2, 6]))
    reduced = meter.reduce()
    assert (reduced["share"].mean, reduced["length"].mean) == (0.5, 3.0)


def test_a_number_alone_has_no_spread_and_no_number_has_no_mean():
    meter = Meter()
    meter.add("one", torch.tensor(2.5))
    meter.add("none", torch.tensor([1.0]), torch.tensor([False]))
    reduced = meter.reduce()
    assert (reduced["one"].mean, reduced["one"].std) == (2.5, 0.0)
    assert "none" not in reduced


def test_many_small_numbers_are_added_in_double_precision():
    meter = Meter()
    meter.add("x", torch.full((1,), 1e8))
    for _ in range(100):
        meter.add("x", torch.ones(1, dtype=torch.bfloat16))
    assert meter.reduce()["x"].mean == pytest.approx((1e8 + 100) / 101, rel=1e-12)


def test_no_gradient_is_kept():
    meter = Meter()
    x = torch.ones(3, requires_grad=True)
    meter.add("x", 2 * x)
    assert meter.reduce()["x"].mean == 2.0
    assert x.grad is None


def test_reducing_starts_anew():
    meter = Meter()
    assert meter.reduce() == {}
    meter.add("x", torch.tensor([1.0]))
    meter.reduce()
    meter.add("y", torch.tensor([3.0]))
    assert set(meter.reduce()) == {"y"}


@pytest.mark.invariant(40)
def test_all_ranks_count_in_one_collective_whatever_order_the_names_came_in(monkeypatch):
    calls = []
    # The other process added 4 and 6 to a, and 1 to b.
    other = torch.tensor([[2.0, 10.0, 52.0], [1.0, 1.0, 1.0]], dtype=torch.float64)

    def summed(moments):
        calls.append(moments)
        return moments + other

    monkeypatch.setattr("lightning_rlhf.modules.meter.sum_over_ranks", summed)
    meter = Meter()
    meter.add("b", torch.tensor([3.0, 5.0]))
    meter.add("a", torch.tensor([2.0]))
    reduced = meter.reduce()
    assert len(calls) == 1
    assert (reduced["a"].mean, reduced["b"].mean) == (4.0, 3.0)
    assert reduced["a"].std == pytest.approx(statistics.stdev([2, 4, 6]), rel=1e-12)
    assert reduced["b"].std == pytest.approx(statistics.stdev([1, 3, 5]), rel=1e-12)
