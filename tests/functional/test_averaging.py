"""How tokens are weighed: every mode by hand, and no split of a minibatch that changes it."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.functional.averaging import Averaging, averaging_count, token_weights

MODES: list[Averaging] = ["tokens", "responses", "length"]
LENGTH = 5
# Three tokens, none, two with a hole between them, one.
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()
TERMS = torch.tensor([[1.0, 2.0, 6.0, 70.0], [70.0, 70.0, 70.0, 70.0], [4.0, 70.0, 6.0, 70.0], [8.0, 70.0, 70.0, 70.0]])
MEANS = {
    "tokens": (1.0 + 2.0 + 6.0 + 4.0 + 6.0 + 8.0) / 6.0,
    "responses": (3.0 + 5.0 + 8.0) / 3.0,
    "length": (9.0 + 10.0 + 8.0) / 5.0 / 3.0,
}


def weighed(terms: Tensor, mask: Tensor, mode: Averaging) -> Tensor:
    return (token_weights(mask, mode, LENGTH) * terms).sum()


def splits(rows: int) -> Iterator[list[list[int]]]:
    """All ways to cut the rows, in two orders, into micro-batches."""
    for order in (list(range(rows)), [2, 0, 3, 1]):
        for number in range(rows):
            for cuts in combinations(range(1, rows), number):
                edges = [0, *cuts, rows]
                yield [order[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]


@pytest.mark.invariant(30)
@pytest.mark.parametrize("mode", MODES)
def test_weights_over_the_count_are_the_mean_by_hand(mode: Averaging) -> None:
    mean = weighed(TERMS, MASK, mode) / averaging_count(MASK, mode).sum()
    assert mean.item() == pytest.approx(MEANS[mode], rel=1e-6)


@pytest.mark.invariant(30)
def test_weights_by_hand() -> None:
    third, half = 1.0 / 3.0, 0.5
    over_responses = torch.tensor([[third, third, third, 0], [0, 0, 0, 0], [half, 0, half, 0], [1, 0, 0, 0]])
    assert_close(token_weights(MASK, "responses"), over_responses, rtol=1e-7, atol=0.0)
    assert torch.equal(token_weights(MASK, "tokens"), MASK.float())
    assert_close(token_weights(MASK, "length", 5), MASK * 0.2, rtol=1e-7, atol=0.0)


@pytest.mark.invariant(30)
def test_counts_by_hand() -> None:
    assert averaging_count(MASK, "tokens").tolist() == [3.0, 0.0, 2.0, 1.0]
    assert averaging_count(MASK, "responses").tolist() == [1.0, 0.0, 1.0, 1.0]
    assert averaging_count(MASK, "length").tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.invariant(30)
@pytest.mark.parametrize("mode", MODES)
def test_no_split_into_micro_batches_changes_the_loss_or_its_gradient(mode: Averaging) -> None:
    parameter = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    features = torch.randn(*MASK.shape, 3, dtype=torch.float64)
    count = averaging_count(MASK, mode).sum()

    def gradient(rows: list[int]) -> tuple[Tensor, Tensor]:
        """Loss and gradient of a micro-batch, cut off after its longest response."""
        width = max(1, int((MASK[rows] * torch.arange(1, 5)).max()))
        loss = weighed((features[rows, :width] @ parameter).tanh(), MASK[rows, :width], mode) / count
        return loss.detach(), torch.autograd.grad(loss, parameter)[0]

    whole = gradient([0, 1, 2, 3])
    for split in splits(4):
        losses, gradients = zip(*map(gradient, split), strict=True)
        assert_close(sum(losses), whole[0], rtol=1e-12, atol=1e-12)
        assert_close(sum(gradients), whole[1], rtol=1e-12, atol=1e-12)


@pytest.mark.invariant(30)
def test_the_modes_pull_differently_where_lengths_differ() -> None:
    means = [(weighed(TERMS, MASK, mode) / averaging_count(MASK, mode).sum()).item() for mode in MODES]
    assert means == pytest.approx([4.5, 16.0 / 3.0, 1.8], rel=1e-6)


@pytest.mark.invariant(30)
def test_the_modes_agree_where_all_responses_are_as_long_as_the_fixed_length() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    terms = torch.randn(3, LENGTH, dtype=torch.float64)
    for mode in MODES:
        mean = weighed(terms, mask, mode) / averaging_count(mask, mode).sum()
        assert mean.item() == pytest.approx(terms.mean().item(), rel=1e-6)


@pytest.mark.invariant(30)
@pytest.mark.parametrize("mode", MODES)
def test_padding_on_either_side_weighs_and_counts_nothing(mode: Averaging) -> None:
    none = torch.zeros(4, 2, dtype=torch.bool)
    weights = token_weights(torch.cat([none, MASK, none], dim=1), mode, LENGTH)
    assert torch.equal(weights[:, 2:6], token_weights(MASK, mode, LENGTH))
    assert weights.count_nonzero() == 6
    assert torch.equal(averaging_count(torch.cat([none, MASK], dim=1), mode), averaging_count(MASK, mode))


@pytest.mark.invariant(31)
@pytest.mark.parametrize("mode", MODES)
def test_a_fully_masked_response_adds_nothing_and_is_not_counted(mode: Averaging) -> None:
    others = [0, 2, 3]
    assert torch.equal(token_weights(MASK, mode, LENGTH)[1], torch.zeros(4))
    assert averaging_count(MASK, mode).sum() == averaging_count(MASK[others], mode).sum()
    assert_close(weighed(TERMS, MASK, mode), weighed(TERMS[others], MASK[others], mode), rtol=1e-6, atol=0.0)


@pytest.mark.invariant(31)
@pytest.mark.parametrize("mode", MODES)
def test_a_minibatch_in_which_nothing_counts_weighs_zero(mode: Averaging) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(token_weights(nothing, mode, LENGTH), torch.zeros(2, 3))
    assert torch.equal(averaging_count(nothing, mode), torch.zeros(2))


def test_tokens_are_what_is_averaged_over_by_default() -> None:
    assert torch.equal(token_weights(MASK), MASK.float())
    assert averaging_count(MASK).tolist() == [3.0, 0.0, 2.0, 1.0]


@pytest.mark.parametrize("length", [None, 0, -3])
def test_a_fixed_length_must_be_given_and_positive(length: int | None) -> None:
    with pytest.raises(ValueError, match=f"`length={length}` must be a positive number"):
        token_weights(MASK, "length", length)
    assert torch.equal(token_weights(MASK, "tokens", length), MASK.float())  # nobody else asks for it
