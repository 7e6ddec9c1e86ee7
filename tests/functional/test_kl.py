"""KL estimators and their gradients, against a policy whose every response can be written down.

The policy is a table: three tokens, of which the first ends the response, and one row of logits for each beginning. A
response is cut off at the greatest length, so that responses of up to three tokens are fifteen, of four lengths and
ways to end.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from lightning_rlhf.functional.advantages import gae, shaped_rewards, token_rewards
from lightning_rlhf.functional.kl import k1, k2, k3
from lightning_rlhf.functional.logprobs import response_logprobs
from lightning_rlhf.functional.masked import masked_sum
from lightning_rlhf.functional.policy import clipped_surrogate

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
EOS = 0
LENGTHS = [1, 2, 3]


class Responses(NamedTuple):
    """All responses: their tokens, the rows of the table that predict these, and where they count."""

    tokens: Tensor
    states: Tensor
    mask: Tensor

    @property
    def num_states(self) -> int:
        return int(self.states.max()) + 1


def all_responses(length: int) -> Responses:
    """Every response of at most that many tokens; after token `a` in state `s` comes state `2 s + a`."""
    found: list[tuple[list[int], list[int], list[bool]]] = []

    def write(tokens: list[int], states: list[int]) -> None:
        if tokens and (tokens[-1] == EOS or len(tokens) == length):
            rest = length - len(tokens)  # the padding is a real token of a real state, but not of the response
            found.append((tokens + rest * [0], states + rest * [0], len(tokens) * [True] + rest * [False]))
            return
        state = 2 * states[-1] + tokens[-1] if tokens else 0
        for token in range(3):
            write([*tokens, token], [*states, state])

    write([], [])
    return Responses(*(torch.tensor(part) for part in zip(*found, strict=True)))


def tables(responses: Responses) -> tuple[Tensor, Tensor]:
    """Logits of a policy and of a reference not far from it."""
    table = torch.randn(responses.num_states, 3, dtype=torch.float64)
    reference = table + 0.7 * torch.randn_like(table)
    return table.requires_grad_(), reference


def chances(table: Tensor) -> Tensor:
    """How likely each state is reached, from the table alone."""
    probs = table.softmax(-1)
    reached = [torch.ones((), dtype=table.dtype)]
    for state in range(1, len(table)):
        token = 2 - state % 2
        before = (state - token) // 2
        reached.append(reached[before] * probs[before, token])
    return torch.stack(reached)


def divergence(table: Tensor, reference: Tensor) -> Tensor:
    """KL of the policy from the reference by the chain rule: that of every state, as often as it is reached."""
    return (chances(table) * kl_divergence(Categorical(logits=table), Categorical(logits=reference))).sum()


def expected(table: Tensor, responses: Responses, per_response: Tensor) -> Tensor:
    """Mean over what the policy writes; how often it does is a number here, as it is for one who samples."""
    logprobs = table.detach().log_softmax(-1)[responses.states, responses.tokens]
    return ((logprobs * responses.mask).sum(1).exp() * per_response).sum()


def gradient(loss: Tensor, parameters: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameters)[0]


def both_logprobs(table: Tensor, reference: Tensor, responses: Responses) -> tuple[Tensor, Tensor]:
    return tuple(response_logprobs(logits[responses.states], responses.tokens)[0] for logits in (table, reference))


def gradient_of_estimator_in_loss(
    estimator: Callable[[Tensor, Tensor], Tensor], table: Tensor, reference: Tensor, responses: Responses
) -> Tensor:
    """What descent on the sum of a per-token estimator follows on average."""
    estimates = estimator(*both_logprobs(table, reference, responses))
    return gradient(expected(table, responses, masked_sum(estimates, responses.mask, dim=1)), table)


def far_apart(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() > 0.05 * second.norm())


def test_the_responses_are_all_there_are() -> None:
    for length, number in zip(LENGTHS, [3, 7, 15], strict=True):
        responses = all_responses(length)
        assert responses.tokens.shape == (number, length)
        table, _ = tables(responses)
        ones = torch.ones(number, dtype=torch.float64)
        assert expected(table, responses, ones).item() == pytest.approx(1.0, rel=1e-12)
    assert sorted(responses.mask.sum(1).tolist()) == [1] + [2] * 2 + [3] * 12


def test_estimates_by_hand() -> None:
    logprobs = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    ref_logprobs = torch.tensor([0.25, 0.5], dtype=torch.float64).log()
    ln2 = 0.6931471805599453
    assert k1(logprobs, ref_logprobs).tolist() == pytest.approx([ln2, -ln2], rel=1e-12)
    assert k2(logprobs, ref_logprobs).tolist() == pytest.approx([0.5 * ln2**2, 0.5 * ln2**2], rel=1e-12)
    assert k3(logprobs, ref_logprobs).tolist() == pytest.approx([0.5 - 1.0 + ln2, 2.0 - 1.0 - ln2], rel=1e-12)


def test_gradients_of_estimates_by_hand() -> None:
    logprobs = torch.tensor([0.5, 0.25], dtype=torch.float64).log().requires_grad_()
    ref_logprobs = torch.tensor([0.25, 0.5], dtype=torch.float64).log()
    ln2 = 0.6931471805599453
    for estimator, slope in ((k1, [1.0, 1.0]), (k2, [ln2, -ln2]), (k3, [0.5, -1.0])):
        assert gradient(estimator(logprobs, ref_logprobs).sum(), logprobs).tolist() == pytest.approx(slope, rel=1e-12)


@pytest.mark.invariant(20)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: Callable[[Tensor, Tensor], Tensor], length: int) -> None:
    responses = all_responses(length)
    table, reference = tables(responses)
    estimates = estimator(*both_logprobs(table, reference, responses)).detach()
    mean = expected(table, responses, masked_sum(estimates, responses.mask, dim=1))
    assert mean.item() == pytest.approx(divergence(table, reference).item(), rel=1e-12)


@pytest.mark.invariant(20)
def test_the_divergence_is_from_the_policy_to_the_reference_and_not_back() -> None:
    responses = all_responses(1)
    probs, ref_probs = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], dtype=torch.float64)
    forth = 0.5 * torch.tensor(4.0).log() + 0.25 * torch.tensor(2.0).log() + 0.25 * torch.tensor(1.0 / 3.0).log()
    logprobs, ref_logprobs = both_logprobs(probs.log()[None], ref_probs.log()[None], responses)
    for estimator in (k1, k3):
        mean = (probs * estimator(logprobs, ref_logprobs)[:, 0]).sum()
        assert mean.item() == pytest.approx(forth.item(), rel=1e-6)


@pytest.mark.invariant(20)
def test_k2_is_biased_and_nearly_right_where_the_policies_are_near() -> None:
    responses = all_responses(3)
    table, reference = tables(responses)
    errors = []
    for step in (1.0, 0.01):
        near = table.detach() + step * (reference - table.detach())
        estimates = masked_sum(k2(*both_logprobs(table, near, responses)), responses.mask, dim=1)
        errors.append((expected(table, responses, estimates) / divergence(table, near) - 1.0).abs().item())
    assert errors[0] > 0.01
    assert errors[1] < 0.01


@pytest.mark.invariant(20)
def test_k2_and_k3_are_never_negative_and_zero_only_where_both_agree() -> None:
    log_ratio = torch.cat([torch.linspace(-20.0, 20.0, 401), torch.logspace(-12, 0, 13)]).double()
    logprobs, ref_logprobs = torch.zeros_like(log_ratio), -log_ratio
    for estimator in (k2, k3):
        estimates = estimator(logprobs, ref_logprobs)
        assert (estimates >= 0.0).all()
        assert (estimates[log_ratio.abs() > 1e-3] > 0.0).all()
        assert torch.equal(estimator(logprobs, logprobs), torch.zeros_like(log_ratio))
    assert torch.equal(k1(logprobs, ref_logprobs), log_ratio)  # of either sign


@pytest.mark.invariant(20)
def test_k3_keeps_its_digits_where_the_policies_almost_agree() -> None:
    for log_ratio in (1e-2, 1e-3, 1e-4):
        estimate = k3(torch.tensor([log_ratio]), torch.tensor([0.0])).item()  # single precision
        assert estimate == pytest.approx(0.5 * log_ratio**2 - log_ratio**3 / 6.0, rel=5e-3)


@pytest.mark.invariant(20)
def test_tokens_after_the_response_do_not_enter_the_divergence() -> None:
    responses = all_responses(3)
    table, reference = tables(responses)
    for estimator in (k1, k2, k3):
        logprobs, ref_logprobs = both_logprobs(table, reference, responses)
        clean = masked_sum(estimator(logprobs, ref_logprobs), responses.mask, dim=1)
        dirty = masked_sum(
            estimator(logprobs, ref_logprobs.masked_fill(~responses.mask, torch.nan)), responses.mask, dim=1
        )
        assert torch.equal(dirty, clean)


@pytest.mark.invariant(21)
@pytest.mark.parametrize("length", LENGTHS)
def test_k1_in_the_reward_has_the_gradient_of_the_divergence(length: int) -> None:
    responses = all_responses(length)
    table, reference = tables(responses)
    logprobs, ref_logprobs = both_logprobs(table, reference, responses)
    summed = masked_sum(k1(logprobs, ref_logprobs), responses.mask, dim=1)  # (responses,)
    advantages = -summed[:, None].expand_as(logprobs)  # every token answers for the whole response
    surrogate = clipped_surrogate((logprobs - logprobs.detach()).exp(), advantages)
    mean = expected(table, responses, masked_sum(surrogate, responses.mask, dim=1))
    assert_close(gradient(mean, table), gradient(divergence(table, reference), table), **CLOSE)


@pytest.mark.invariant(21)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_charged_rewards_and_any_values_have_the_gradient_of_what_rlhf_asks_for(kl_coef: float, length: int) -> None:
    responses = all_responses(length)
    table, reference = tables(responses)
    scores = torch.randn(len(responses.tokens), dtype=torch.float64)
    values = torch.randn(responses.num_states, dtype=torch.float64)[responses.states]
    logprobs, ref_logprobs = both_logprobs(table, reference, responses)

    rewards = token_rewards(scores, None, responses.mask)
    rewards = shaped_rewards(rewards, k1(logprobs, ref_logprobs).detach(), responses.mask, kl_coef)
    advantages, _ = gae(rewards, values, responses.mask, gamma=1.0, gae_lambda=1.0)
    surrogate = clipped_surrogate((logprobs - logprobs.detach()).exp(), advantages)
    mean = expected(table, responses, masked_sum(surrogate, responses.mask, dim=1))

    naive = (table.log_softmax(-1)[responses.states, responses.tokens] * responses.mask).sum(1).exp()
    objective = (naive * scores).sum() - kl_coef * divergence(table, reference)
    assert_close(gradient(mean, table), -gradient(objective, table), **CLOSE)


@pytest.mark.invariant(21)
@pytest.mark.parametrize("length", LENGTHS)
def test_half_the_squared_summed_log_ratio_in_the_loss_has_the_gradient_of_the_divergence(length: int) -> None:
    responses = all_responses(length)
    table, reference = tables(responses)
    summed = [masked_sum(part, responses.mask, dim=1) for part in both_logprobs(table, reference, responses)]
    mean = expected(table, responses, k2(*summed))
    assert_close(gradient(mean, table), gradient(divergence(table, reference), table), **CLOSE)


@pytest.mark.invariant(21)
def test_k2_of_every_token_in_the_loss_is_right_for_responses_of_one_token() -> None:
    responses = all_responses(1)
    table, reference = tables(responses)
    actual = gradient_of_estimator_in_loss(k2, table, reference, responses)
    assert_close(actual, gradient(divergence(table, reference), table), **CLOSE)


@pytest.mark.invariant(21)
def test_k2_of_every_token_in_the_loss_forgets_that_a_token_decides_what_comes_after_it() -> None:
    responses = all_responses(3)
    table, reference = tables(responses)
    actual = gradient_of_estimator_in_loss(k2, table, reference, responses)
    assert far_apart(actual, gradient(divergence(table, reference), table))
    per_state = kl_divergence(Categorical(logits=table), Categorical(logits=reference))
    assert_close(actual, gradient((chances(table).detach() * per_state).sum(), table), **CLOSE)


@pytest.mark.invariant(21)
@pytest.mark.parametrize("length", LENGTHS)
def test_k1_in_the_loss_has_no_expected_gradient(length: int) -> None:
    responses = all_responses(length)
    table, reference = tables(responses)
    actual = gradient_of_estimator_in_loss(k1, table, reference, responses)
    assert_close(actual, torch.zeros_like(actual), **CLOSE)


@pytest.mark.invariant(21)
def test_k3_in_the_loss_has_the_gradient_of_the_reverse_divergence_for_one_token() -> None:
    responses = all_responses(1)
    table, reference = tables(responses)
    actual = gradient_of_estimator_in_loss(k3, table, reference, responses)
    assert far_apart(actual, gradient(divergence(table, reference), table))
    assert_close(actual, gradient(divergence(reference, table), table), **CLOSE)


@pytest.mark.invariant(21)
def test_k3_in_the_loss_has_neither_divergence_s_gradient_for_three_tokens() -> None:
    responses = all_responses(3)
    table, reference = tables(responses)
    actual = gradient_of_estimator_in_loss(k3, table, reference, responses)
    assert far_apart(actual, gradient(divergence(table, reference), table))
    assert far_apart(actual, gradient(divergence(reference, table), table))
    # What it has: the reverse divergence of every state, as often as the policy, not the reference, reaches it.
    reverse = kl_divergence(Categorical(logits=reference), Categorical(logits=table))
    assert_close(actual, gradient((chances(table).detach() * reverse).sum(), table), **CLOSE)
