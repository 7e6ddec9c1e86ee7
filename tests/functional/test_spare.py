"""Large pieces of memory, used again: never while somebody holds a tensor in them."""

import pytest
import torch

from lightning_rlhf.functional import head, spare
from lightning_rlhf.functional.head import head_logprobs
from lightning_rlhf.functional.spare import SMALLEST, Spare


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(spare, "SMALLEST", 0)


def given(kept: Spare, tensor: torch.Tensor) -> int:
    """Gives a tensor's memory, which the caller still names, and says where it lies."""
    piece = tensor.untyped_storage()
    place = piece.data_ptr()
    del tensor
    kept.give("some", piece)
    return place


@pytest.mark.usefixtures("everything_is_large")
def test_a_piece_is_used_again_for_what_fits_in():
    kept, like = Spare(), torch.empty(0)
    place = given(kept, torch.ones(12))
    taken = kept.take("some", (2, 5), like)
    assert taken.data_ptr() == place
    assert taken.shape == (2, 5)
    assert taken.is_contiguous()
    assert kept.take("some", (2, 5), like).data_ptr() != place, "it is nobody else's while it is taken"


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(("use", "shape", "dtype"), [("other", (3,), torch.float32), ("some", (4, 5), torch.float32),
                                                     ("some", (7,), torch.float64)])  # fmt: skip
def test_another_use_or_more_than_there_is_gets_fresh_memory(use, shape, dtype):
    kept = Spare()
    place = given(kept, torch.ones(12))
    taken = kept.take(use, shape, torch.empty(0, dtype=dtype))
    assert taken.data_ptr() != place
    assert (taken.shape, taken.dtype) == (shape, dtype)


@pytest.mark.usefixtures("everything_is_large")
def test_what_somebody_holds_is_not_taken_from_them():
    kept, like = Spare(), torch.empty(0)
    held = torch.arange(12.0)
    view = held[3:]
    for tensor in (held, view):
        kept.give("some", tensor.untyped_storage())
    del held, tensor
    kept.give("some", view.untyped_storage())
    kept.take("some", (12,), like).fill_(-1.0)
    assert view.tolist() == list(range(3, 12))


def test_small_pieces_are_left_to_the_allocator_and_a_clear_gives_all_back():
    kept, like = Spare(), torch.empty(0)
    small = given(kept, torch.ones(SMALLEST // 4 - 1))
    assert not kept._pieces, small
    given(kept, torch.ones(SMALLEST // 4))
    assert kept._pieces
    kept.clear()
    assert not kept._pieces
    assert kept.take("some", (3,), like).shape == (3,)


@pytest.mark.usefixtures("everything_is_large")
def test_a_head_finds_its_exponentials_again_and_says_the_same(monkeypatch):
    monkeypatch.setattr(head, "TILE", 40)
    monkeypatch.setattr(head, "NARROWEST", 1)
    torch.manual_seed(0)
    weight, kept, places = torch.randn(37, 12, requires_grad=True), Spare(), []
    for count in (9, 9, 5, 9):
        states, tokens = torch.randn(count, 12, requires_grad=True), torch.randint(37, (count,))
        found, expected = (head_logprobs(states, weight, None, tokens, spare=memory) for memory in (kept, None))
        mine, theirs = (
            torch.autograd.grad(said[0].sum() + said[1].sum(), [states, weight]) for said in (found, expected)
        )
        assert all(map(torch.equal, (*found, *mine), (*expected, *theirs)))
        places.append(kept._pieces["exponentials"].data_ptr())
        del mine
    assert len(set(places)) == 1


@pytest.mark.usefixtures("everything_is_large")
def test_exponentials_that_another_backward_pass_will_need_stay(monkeypatch):
    kept = Spare()
    weight = torch.randn(37, 12, requires_grad=True)
    states, tokens = torch.randn(9, 12), torch.randint(37, (9,))
    logprobs, _ = head_logprobs(states, weight, None, tokens, spare=kept)
    (first,) = torch.autograd.grad(logprobs.sum(), weight, retain_graph=True)
    assert not kept._pieces
    head_logprobs(2 * states, weight, None, tokens, spare=kept)
    (second,) = torch.autograd.grad(logprobs.sum(), weight)
    assert torch.equal(first, second)
    assert kept._pieces
