"""Bytes that are alive are counted as they come and go, with numbers or without."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_rlhf.planning.live import Live

KIB = 1024 // 4  # numbers in single precision


def test_the_peak_is_when_most_was_alive():
    with FakeTensorMode(), Live("a") as live:
        first = torch.empty(3 * KIB)
        second = first * 2
        del first
        third = torch.empty(KIB)
        assert live.now == {"a": 4 * 1024}
        del second, third
    assert live.now.total() == 0
    assert live.peak == {"a": 6 * 1024}


def test_views_and_what_is_written_in_place_take_nothing():
    with FakeTensorMode(), Live("a") as live:
        whole = torch.empty(4 * KIB)
        part = whole[KIB:].view(3, KIB)
        part.add_(1.0)
        del whole
        assert live.now["a"] == 4 * 1024  # for as long as a view of it lives
        del part
    assert live.now["a"] == 0


def test_memory_is_labelled_when_it_is_made_or_later():
    with FakeTensorMode(), Live("a") as live:
        parameter = torch.empty(9 * KIB)
    with FakeTensorMode(), Live("a") as live:
        parameter = torch.empty(9 * KIB)
        live.relabel(parameter, "b")
        with live.labelled("c"):
            other = torch.empty(KIB)
        more = torch.empty(2 * KIB)
    assert live.now == {"a": 2 * 1024, "b": 9 * 1024, "c": 1024}
    del parameter, other, more
    assert live.now.total() == 0


def test_what_was_there_before_does_not_count_nor_do_its_views():
    with FakeTensorMode():
        weight = torch.empty(5 * KIB)
        with Live("a") as live:
            live.ignore([weight])
            view = weight.view(5, KIB)
            live.relabel(view, "b")
            made = view + 1.0
    assert live.now == {"a": 5 * 1024}
    del made


def test_a_backward_pass_holds_what_autograd_keeps_with_numbers_as_without():
    def peak(mode):
        with mode:
            layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            x = torch.empty(32, 64)
            with Live("a") as live:
                live.ignore([x, *layers.parameters()])
                layers(x).sum().backward()
                kept = sum(p.numel() * 4 for p in layers.parameters())
            assert live.now["a"] == kept  # the gradients
            return live.peak["a"]

    class Nothing:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    assert peak(FakeTensorMode()) == peak(Nothing())
    # Both hidden layers are kept, before and after the activation, with what comes out.
    assert peak(FakeTensorMode()) >= 2 * 32 * 128 * 4 + 32 * 64 * 4
