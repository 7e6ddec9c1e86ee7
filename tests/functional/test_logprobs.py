"""Log-probs and entropies: the shift by hand, and chunks against torch's own softmax."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlhf.functional.logprobs import response_inputs, response_logprobs

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
VOCABULARY = 11
CHUNKS = [1, 2, 4, 10, 11, 12, 8192]

# A model that looks one token back: what follows token 0, 1, 2 or 3, and what a state after it is worth.
FOLLOWS = torch.tensor(
    [[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125], [0.125, 0.125, 0.25, 0.5]]
).double()
WORTH = torch.tensor([10.0, 11.0, 12.0, 13.0])


def naive(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Another implementation, with all of the vocabulary at once."""
    policy = Categorical(logits=logits / temperature)
    return policy.log_prob(tokens), policy.entropy()


def numbers(*shape: int) -> tuple[Tensor, Tensor]:
    logits = 3.0 * torch.randn(*shape, VOCABULARY, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(VOCABULARY, shape)


def gradient(outputs: tuple[Tensor, Tensor], logits: Tensor, upstream: tuple[Tensor, Tensor]) -> Tensor:
    """Through log-probs and entropies at once, every one with a weight of its own."""
    total = (upstream[0] * outputs[0] + upstream[1] * outputs[1]).sum()
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.invariant(5)
def test_a_token_is_predicted_by_the_state_before_it_by_hand() -> None:
    prompt = torch.tensor([[0, 3], [1, 2]])
    response = torch.tensor([[2, 1, 0], [2, 2, 3]])
    inputs = response_inputs(prompt, response)
    assert inputs.tolist() == [[0, 3, 2, 1], [1, 2, 2, 2]]

    states = inputs[:, 1:]  # the last three: as many as the response is long
    logprobs, _ = response_logprobs(FOLLOWS.log()[states], response)
    # After 3 comes 2, after 2 comes 1, after 1 comes 0; after 2 comes 2, twice, and then 3.
    assert_close(logprobs.exp(), torch.tensor([[0.25, 0.5, 0.5], [0.25, 0.25, 0.125]]).double(), **CLOSE)
    assert WORTH[states].tolist() == [[13.0, 12.0, 11.0], [12.0, 12.0, 12.0]]


@pytest.mark.invariant(5)
def test_log_probs_one_by_one_are_those_of_the_whole_response() -> None:
    prompt, response = torch.tensor([[1, 3]]), torch.tensor([[0, 2, 3, 1, 1]])
    inputs = response_inputs(prompt, response)
    together, _ = response_logprobs(FOLLOWS.log()[inputs[:, -5:]], response)
    read = prompt
    for t in range(5):
        alone, _ = response_logprobs(FOLLOWS.log()[read[:, -1:]], response[:, t : t + 1])
        assert torch.equal(alone[:, 0], together[:, t])
        read = torch.cat([read, response[:, t : t + 1]], dim=1)


@pytest.mark.invariant(5)
def test_the_last_token_is_not_read_and_all_others_are() -> None:
    prompt, response = torch.tensor([[7, 8]]), torch.tensor([[1, 2, 3]])
    inputs = response_inputs(prompt, response)
    assert torch.equal(response_inputs(prompt, torch.tensor([[1, 2, 9]])), inputs)
    assert response_inputs(prompt, torch.tensor([[1, 9, 3]])).tolist() == [[7, 8, 1, 9]]
    assert response_inputs(prompt, torch.tensor([[5]])).tolist() == [[7, 8]]


@pytest.mark.invariant(5)
def test_masks_are_joined_like_the_tokens_that_they_are_of() -> None:
    prompt_mask = torch.tensor([[False, True], [True, True]])
    response_mask = torch.tensor([[True, True, True], [True, False, False]])
    joined = response_inputs(prompt_mask, response_mask)
    assert joined.dtype == torch.bool
    assert joined.tolist() == [[False, True, True, True], [True, True, True, False]]


def test_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64).log() + 5.0
    logprobs, entropy = response_logprobs(logits, torch.tensor([1, 2]))
    assert logprobs.tolist() == pytest.approx([math.log(0.25), math.log(0.6)], rel=1e-12)
    expected = [1.5 * math.log(2.0), -0.4 * math.log(0.2) - 0.6 * math.log(0.6)]
    assert entropy.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.invariant(15)
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_chunks_of_any_size_give_what_one_softmax_gives(chunk_size: int) -> None:
    logits, tokens = numbers(3, 4)
    upstream = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    actual, expected = response_logprobs(logits, tokens, chunk_size=chunk_size), naive(logits, tokens)
    assert_close(actual[0], expected[0], **CLOSE)
    assert_close(actual[1], expected[1], **CLOSE)
    assert_close(gradient(actual, logits, upstream), gradient(expected, logits, upstream), **CLOSE)


@pytest.mark.invariant(15)
@pytest.mark.parametrize("chunk_size", [1, 4, 8192])
@pytest.mark.parametrize("which", [0, 1])
def test_log_probs_and_entropies_have_their_gradients_alone_too(which: int, chunk_size: int) -> None:
    logits, tokens = numbers(6)
    upstream = torch.randn(6, dtype=torch.float64)
    actual = response_logprobs(logits, tokens, 0.7, chunk_size)[which]
    expected = naive(logits, tokens, 0.7)[which]
    assert_close(
        torch.autograd.grad(actual, logits, upstream)[0], torch.autograd.grad(expected, logits, upstream)[0], **CLOSE
    )


@pytest.mark.invariant(15)
def test_gradients_are_those_of_finite_differences() -> None:
    logits, tokens = numbers(2, 2)
    assert torch.autograd.gradcheck(lambda x: response_logprobs(x, tokens, 1.3, chunk_size=4), logits)


@pytest.mark.invariant(15)
@pytest.mark.parametrize("chunk_size", [1, 4, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_single_precision_softmax(dtype: torch.dtype, chunk_size: int) -> None:
    logits, tokens = numbers(5)
    logits = logits.detach().to(dtype).requires_grad_()
    actual = response_logprobs(logits, tokens, chunk_size=chunk_size)
    assert [part.dtype for part in actual] == [torch.float32, torch.float32]

    exact = logits.detach().double().requires_grad_()  # the same numbers
    expected = naive(exact, tokens)
    for part, wanted in zip(actual, expected, strict=True):
        assert_close(part.double(), wanted, rtol=1e-5, atol=1e-6)
    coarse = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (coarse - expected[0]).abs().max() > 1e-4  # what the softmax of the logits' own precision is off by

    upstream = torch.randn(2, 5).unbind()
    slope = gradient(actual, logits, upstream)
    assert slope.dtype == dtype
    wanted = gradient(expected, exact, upstream)
    assert_close(slope.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)  # rounded once


@pytest.mark.invariant(15)
@pytest.mark.parametrize("chunk_size", [1, 3, 8192])
def test_tokens_that_cannot_be_drawn_might_as_well_not_be_in_the_vocabulary(chunk_size: int) -> None:
    logits, _ = numbers(4)
    kept = torch.tensor([0, 1, 6, 10])  # so that some chunks hold nothing that can be drawn
    narrow = logits.detach()[:, kept].requires_grad_()
    wide = torch.full_like(logits, -torch.inf).index_copy(1, kept, narrow.detach()).requires_grad_()
    tokens = torch.tensor([3, 0, 2, 1])
    upstream = torch.randn(2, 4, dtype=torch.float64).unbind()

    actual, expected = response_logprobs(wide, kept[tokens], 0.8, chunk_size), naive(narrow, tokens, 0.8)
    assert_close(actual[0], expected[0], **CLOSE)
    assert_close(actual[1], expected[1], **CLOSE)
    slope = gradient(actual, wide, upstream)
    assert_close(slope[:, kept], gradient(expected, narrow, upstream), **CLOSE)
    assert slope.count_nonzero() <= 4 * 4  # nothing, not even NaN, elsewhere


@pytest.mark.invariant(15)
def test_a_token_that_cannot_be_drawn_has_log_prob_minus_infinity() -> None:
    logprobs, entropy = response_logprobs(torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([1]), chunk_size=1)
    assert logprobs.item() == -math.inf
    assert entropy.item() == pytest.approx(math.log(2.0), rel=1e-6)


@pytest.mark.invariant(15)
@pytest.mark.parametrize("chunk_size", [4, 8192])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_of_all_logits_changes_nothing_however_far_it_is(shift: float, chunk_size: int) -> None:
    logits, tokens = numbers(5)
    expected = response_logprobs(logits, tokens)
    for part, wanted in zip(response_logprobs(logits + shift, tokens, chunk_size=chunk_size), expected, strict=True):
        assert_close(part, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.invariant(15)
@pytest.mark.parametrize("chunk_size", [1, 8192])
def test_an_order_of_the_vocabulary_changes_nothing(chunk_size: int) -> None:
    logits, tokens = numbers(5)
    order = torch.randperm(VOCABULARY)
    actual = response_logprobs(logits[:, order], order.argsort()[tokens], chunk_size=chunk_size)
    for part, wanted in zip(actual, response_logprobs(logits, tokens), strict=True):
        assert_close(part, wanted, **CLOSE)


@pytest.mark.invariant(15)
def test_no_single_precision_copy_of_all_logits_is_made_in_either_pass() -> None:
    class Widest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                self.numel = max(self.numel, result.numel())
            return result

    logits, tokens = torch.randn(3, 64).bfloat16().requires_grad_(), torch.tensor([0, 20, 63])
    with Widest() as forward:
        logprobs, entropy = response_logprobs(logits, tokens, chunk_size=64)
    with Widest() as backward:
        (logprobs + entropy).sum().backward()
    assert forward.numel == 64
    assert backward.numel == 64


@pytest.mark.invariant(16)
@pytest.mark.parametrize("chunk_size", [4, 8192])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_log_probs_entropies_and_gradients_are_those_of_logits_over_temperature(
    temperature: float, chunk_size: int
) -> None:
    logits, tokens = numbers(3, 4)
    upstream = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    actual = response_logprobs(logits, tokens, temperature, chunk_size)
    expected = naive(logits, tokens, temperature)
    assert_close(actual[0], expected[0], **CLOSE)
    assert_close(actual[1], expected[1], **CLOSE)
    assert_close(gradient(actual, logits, upstream), gradient(expected, logits, upstream), **CLOSE)


@pytest.mark.invariant(16)
def test_temperature_by_hand() -> None:
    logits = torch.tensor([[4.0, 1.0]], dtype=torch.float64).log()
    logprobs, entropy = response_logprobs(logits, torch.tensor([0]), temperature=2.0)  # 2 to 1
    assert logprobs.item() == pytest.approx(math.log(2.0 / 3.0), rel=1e-12)
    assert entropy.item() == pytest.approx(math.log(3.0) - 2.0 / 3.0 * math.log(2.0), rel=1e-12)


@pytest.mark.invariant(16)
def test_heat_makes_all_tokens_alike_and_cold_the_likeliest_certain() -> None:
    logits, tokens = numbers(5)
    logprobs, entropy = response_logprobs(logits, tokens, temperature=1e9)
    assert_close(logprobs, torch.full_like(logprobs, -math.log(VOCABULARY)), rtol=1e-6, atol=0.0)
    assert_close(entropy, torch.full_like(entropy, math.log(VOCABULARY)), rtol=1e-6, atol=0.0)
    logprobs, entropy = response_logprobs(logits, logits.argmax(-1), temperature=1e-4)
    assert_close(logprobs, torch.zeros_like(logprobs), rtol=0.0, atol=1e-9)
    assert_close(entropy, torch.zeros_like(entropy), rtol=0.0, atol=1e-9)


@pytest.mark.invariant(16)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    logits, tokens = numbers(2)
    with pytest.raises(ValueError, match=f"`temperature={temperature}` must be positive"):
        response_logprobs(logits, tokens, temperature)


def test_probabilities_of_all_tokens_add_up_to_one() -> None:
    logits, _ = numbers(2, 3)
    tokens = torch.arange(VOCABULARY)[:, None, None].expand(-1, 2, 3)
    logprobs, _ = response_logprobs(logits.expand(VOCABULARY, -1, -1, -1), tokens, 0.7, chunk_size=4)
    assert_close(logprobs.exp().sum(0), torch.ones(2, 3, dtype=torch.float64), **CLOSE)


def test_any_number_of_dimensions_comes_before_the_vocabulary() -> None:
    logits, tokens = numbers(2, 3, 4)
    whole = response_logprobs(logits, tokens)
    for rows in ((0,), (1, 2), (1, 0, 3)):
        for part, wanted in zip(response_logprobs(logits[rows], tokens[rows]), whole, strict=True):
            assert_close(part, wanted[rows], **CLOSE)


def test_logits_are_not_written_to_in_either_pass() -> None:
    logits, tokens = numbers(3)
    before = logits.detach().clone()
    logprobs, entropy = response_logprobs(logits, tokens, 0.7, chunk_size=4)
    (logprobs + entropy).sum().backward()
    assert torch.equal(logits, before)


def test_a_second_derivative_is_refused() -> None:
    logits, tokens = numbers(3)
    logprobs, entropy = response_logprobs(logits, tokens)
    (slope,) = torch.autograd.grad((logprobs + entropy).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
