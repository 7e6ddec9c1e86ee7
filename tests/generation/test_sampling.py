"""How a token is drawn: against the cumulative distribution, by hand, and against transformers' own filters."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.generation.sampling import Sampling, draw

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
BELOW_1 = 1.0 - 2.0**-24  # the largest number in single precision that is less than 1
PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.2, 0.1, 0.25])


def grid(n: int = 20_000) -> Tensor:
    """Uniform numbers, evenly spread."""
    return (torch.arange(n) + 0.5) / n


def logits_of(probabilities: Tensor) -> Tensor:
    return probabilities.log()  # minus infinity where there is none


def shares(logits: Tensor, sampling: Sampling, forbidden: Tensor | None = None, n: int = 20_000) -> Tensor:
    """How often each token is drawn over evenly spread numbers."""
    tokens, _, _ = draw(logits.expand(n, -1), grid(n), sampling, forbidden)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n


# --- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.invariant(16)
def test_tokens_come_as_often_as_they_should(temperature: float) -> None:
    powers = PROBABILITIES.double() ** (1.0 / temperature)
    # Evenly spread numbers hit an interval as often as it is long, up to one at either end.
    got = shares(logits_of(PROBABILITIES), Sampling(temperature=temperature))
    assert_close(got.double(), powers / powers.sum(), rtol=0.0, atol=2 / 20_000)


def test_every_number_gives_the_token_whose_interval_it_lies_in() -> None:
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(generator.normal(size=(8, 50)) * 3.0).float()
    mass = np.exp(logits.double().numpy())
    cumulative = np.cumsum(mass / mass.sum(1, keepdims=True), axis=1)
    uniforms = torch.from_numpy(generator.random((500, 8), dtype=np.float32))
    for numbers in uniforms:
        tokens, _, _ = draw(logits, numbers, Sampling())
        for row, (token, number) in enumerate(zip(tokens.tolist(), numbers.double().tolist(), strict=True)):
            below = cumulative[row, token - 1] if token > 0 else 0.0
            assert below - 1e-6 <= number <= cumulative[row, token] + 1e-6


def test_rows_are_drawn_each_with_its_own_number() -> None:
    logits = logits_of(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]))
    assert draw(logits, torch.tensor([0.25, 0.75, 0.75]), Sampling())[0].tolist() == [0, 2, 2]
    assert draw(logits, torch.tensor([0.75, 0.25, 0.25]), Sampling())[0].tolist() == [1, 1, 0]


def test_random_numbers_pass_a_chi_square_test() -> None:
    n = 200_000
    kept = PROBABILITIES > 0
    tokens, _, _ = draw(logits_of(PROBABILITIES).expand(n, -1), torch.rand(n), Sampling())
    counts = torch.bincount(tokens, minlength=6).double()
    expected = n * PROBABILITIES.double()
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert float(chi_square) < 18.5  # of four degrees of freedom, exceeded once in a thousand


@pytest.mark.parametrize("number", [0.0, 2.0**-149, 0.5, BELOW_1, 1.0])  # 1 is more than chance gives
def test_what_has_no_probability_is_never_drawn(number: float) -> None:
    probabilities = torch.tensor(
        [[0.0, 0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    )
    uniforms = torch.full((3,), number)
    for nothing in (-torch.inf, -1e4):
        logits = logits_of(probabilities).clamp(min=nothing)
        for sampling in (Sampling(), Sampling(top_k=5), Sampling(top_p=0.999)):
            tokens, _, _ = draw(logits, uniforms, sampling)
            assert tokens.tolist() == [2 if number < 0.3 else 4, 1, 5]


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_the_ends_of_a_wide_vocabulary_hold(scale: float) -> None:
    logits = scale * torch.randn(16, 50_000)
    logits[:, :100] = logits[:, -100:] = -torch.inf
    for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=1000)):
        for number in (0.0, BELOW_1):
            tokens, logprobs, _ = draw(logits, torch.full((16,), number), sampling)
            assert int(tokens.min()) >= 100
            assert int(tokens.max()) < 49_900
            assert bool(logprobs.isfinite().all())


def test_the_first_and_the_last_possible_token_are_at_the_ends() -> None:
    logits = torch.randn(4, 300)
    assert draw(logits, torch.zeros(4), Sampling())[0].tolist() == [0] * 4
    assert draw(logits, torch.full((4,), BELOW_1), Sampling())[0].tolist() == [299] * 4


# --- log-probs and kept mass ----------------------------------------------------------------------------------------


@pytest.mark.invariant(16)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("narrowing", [{}, {"top_k": 3}, {"top_p": 0.4}, {"top_k": 4, "top_p": 0.7}])
def test_logprobs_are_those_of_the_full_distribution(temperature: float, narrowing: dict[str, Any]) -> None:
    logits = 3.0 * torch.randn(64, 20)
    tokens, logprobs, _ = draw(logits, torch.rand(64), Sampling(temperature=temperature, **narrowing))
    expected = torch.log_softmax(logits.double() / temperature, dim=1).gather(1, tokens[:, None])[:, 0]
    assert_close(logprobs.double(), expected, **CLOSE)


def test_the_logprob_of_what_is_all_but_impossible_is_exact() -> None:
    logits = torch.tensor([[0.0, -95.0, -110.0]])
    only = torch.tensor([True, False, False])
    tokens, logprobs, _ = draw(logits, torch.tensor([0.5]), Sampling(), only)
    assert tokens.item() == 1
    assert logprobs.item() == pytest.approx(-95.0, abs=1e-4)


def test_half_precision_logits_give_single_precision_logprobs() -> None:
    logits = torch.randn(8, 20).bfloat16()
    tokens, logprobs, _ = draw(logits, torch.rand(8), Sampling())
    expected = torch.log_softmax(logits.double(), dim=1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    assert_close(logprobs.double(), expected, **CLOSE)


def test_where_nothing_is_left_out_no_kept_mass_is_spoken_of() -> None:
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_p=1.0), Sampling(top_k=6), Sampling(top_k=9)):
        assert draw(logits_of(PROBABILITIES)[None], torch.tensor([0.5]), sampling)[2] is None


@pytest.mark.parametrize(
    ("sampling", "forbidden", "kept"),
    [
        (Sampling(top_k=1), None, 0.4),
        (Sampling(top_k=3), None, 0.85),
        (Sampling(top_p=0.3), None, 0.4),
        (Sampling(top_p=0.5), None, 0.65),
        (Sampling(top_p=0.84), None, 0.85),
        (Sampling(), [1], 0.6),
        (Sampling(top_k=2), [1], 0.45),
        (Sampling(top_p=0.5), [1, 5], 0.2),  # of 0.35 the half is 0.175
        (Sampling(top_p=0.6), [1, 5], 0.3),  # and six tenths are 0.21
        (Sampling(top_k=4, top_p=0.7), None, 0.85),  # of 0.95, 0.65 is 0.684
    ],
)
def test_the_kept_mass_by_hand(sampling: Sampling, forbidden: list[int] | None, kept: float) -> None:
    mask = None if forbidden is None else torch.tensor([token in forbidden for token in range(6)])
    mass = draw(logits_of(PROBABILITIES)[None], torch.tensor([0.5]), sampling, mask)[2]
    assert mass.item() == pytest.approx(kept, abs=1e-6)


# --- what narrows it ------------------------------------------------------------------------------------------------


def filtered(logits: Tensor, sampling: Sampling, forbidden: Tensor | None) -> Tensor:
    """What transformers draws from, in double precision: its filters, in its order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits.double()
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -torch.inf)
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [] if sampling.top_k is None else [TopKLogitsWarper(sampling.top_k)]
    warpers += [] if sampling.top_p is None else [TopPLogitsWarper(sampling.top_p)]
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores, dim=-1)


@pytest.mark.parametrize("forbidden", [None, [0], [3, 5, 7]])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize(
    "narrowing",
    [{"top_k": 1}, {"top_k": 5}, {"top_p": 0.05}, {"top_p": 0.5}, {"top_p": 0.95}, {"top_k": 6, "top_p": 0.6}, {}],
)
def test_what_is_drawn_from_is_what_transformers_draws_from(
    narrowing: dict[str, Any], temperature: float, forbidden: list[int] | None
) -> None:
    sampling = Sampling(temperature=temperature, **narrowing)
    mask = None if forbidden is None else torch.tensor([token in forbidden for token in range(12)])
    for logits in 2.0 * torch.randn(4, 12):
        expected = filtered(logits[None], sampling, mask)[0]
        got = shares(logits, sampling, mask, n=4000).double()
        assert_close(got, expected, rtol=0.0, atol=2 / 4000)
        full = torch.softmax(logits.double() / temperature, dim=0)
        kept = draw(logits[None], torch.tensor([0.5]), sampling, mask)[2]
        assert_close(1.0 if kept is None else kept.item(), full[expected > 0].sum().item(), **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_of_ties_top_k_keeps_exactly_k(k: int) -> None:
    got = shares(torch.zeros(6), Sampling(top_k=k))
    assert int((got > 0).sum()) == k
    assert_close(got[got > 0], torch.full((k,), 1.0 / k), rtol=0.0, atol=2 / 20_000)
    tied = shares(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), Sampling(top_k=3))
    assert bool((tied[[1, 3]] > 0).all())
    assert int((tied > 0).sum()) == 3


@pytest.mark.parametrize(("top_p", "kept"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    assert int((shares(torch.zeros(4), Sampling(top_p=top_p)) > 0).sum()) == kept


def test_top_p_keeps_the_likeliest_token_however_small_it_is() -> None:
    assert shares(logits_of(PROBABILITIES), Sampling(top_p=1e-9)).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_top_k_of_fewer_possible_tokens_draws_among_those() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    got = shares(logits_of(probabilities), Sampling(top_k=4))
    assert_close(got, probabilities, rtol=0.0, atol=2 / 20_000)


# --- the likeliest token --------------------------------------------------------------------------------------------


def test_at_temperature_0_the_likeliest_token_is_taken_whatever_chance_says() -> None:
    logits = torch.randn(32, 20)
    expected = logits.argmax(1)
    for narrowing in ({}, {"top_k": 1}, {"top_p": 0.1}):
        tokens, logprobs, _ = draw(logits, torch.rand(32), Sampling(temperature=0.0, **narrowing))
        assert tokens.tolist() == expected.tolist()
        at_1 = torch.log_softmax(logits.double(), dim=1).gather(1, expected[:, None])[:, 0]
        assert_close(logprobs.double(), at_1, **CLOSE)


def test_at_temperature_0_the_likeliest_token_that_is_allowed_is_taken() -> None:
    logits = torch.tensor([[1.0, 9.0, 3.0, 2.0], [1.0, 2.0, 0.0, 3.0]])
    forbidden = torch.tensor([False, True, False, False])
    assert draw(logits, torch.rand(2), Sampling(temperature=0.0), forbidden)[0].tolist() == [2, 3]


# --- what is forbidden ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gap", [5.0, 20.0, 200.0, 2000.0])
def test_a_forbidden_token_that_is_all_but_certain_leaves_the_others_as_they_were(
    gap: float, temperature: float
) -> None:
    logits = torch.tensor([0.0, gap, math.log(3.0), -1e4])
    forbidden = torch.tensor([False, True, False, False])
    sampling = Sampling(temperature=temperature)
    odds = 3.0 ** (1.0 / temperature) if temperature else math.inf
    expected = torch.tensor([1.0 / (1.0 + odds), 0.0, 1.0 - 1.0 / (1.0 + odds), 0.0])
    assert_close(shares(logits, sampling, forbidden), expected, rtol=0.0, atol=2 / 20_000)

    tokens, logprobs, kept = draw(logits[None], torch.tensor([0.9]), sampling, forbidden)
    full = torch.log_softmax(logits.double() / (temperature or 1.0), dim=0)
    assert tokens.item() == 2
    assert logprobs.item() == pytest.approx(full[2].item(), rel=1e-5)
    assert kept.item() == pytest.approx((full[0].exp() + full[2].exp()).item(), rel=1e-5, abs=1e-37)


# --- the settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, r"`max_new_tokens=0` must be at least 1"),
        ({"temperature": -0.1}, r"`temperature=-0.1` must be positive, or 0"),
        ({"temperature": math.nan}, r"`temperature=nan` must be positive"),
        ({"top_k": 0}, r"`top_k=0` must be at least 1, or None"),
        ({"top_p": 0.0}, r"`top_p=0.0` must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"`top_p=1.1` must lie in \(0, 1\]"),
        ({"top_p": math.nan}, r"`top_p=nan` must lie in \(0, 1\]"),
        ({"min_new_tokens": -1}, r"`min_new_tokens=-1` must lie between 0 and `max_new_tokens=40`"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, r"`min_new_tokens=5` must lie between 0 and `max_new_tokens=4`"),
        ({"stop": ["x", ""]}, r"`stop=\['x', ''\]` holds an empty string"),
        ({"stop": ""}, r"`stop=\[''\]` holds an empty string"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
    with pytest.raises(ValueError, match=message):
        Sampling.of(fields)
    with pytest.raises(ValueError, match=message):
        Sampling().but(fields)


def test_the_ends_of_what_can_be_set() -> None:
    Sampling(max_new_tokens=1, min_new_tokens=1, temperature=0.0, top_k=1, top_p=1.0)


def test_by_default_nothing_narrows_the_policy() -> None:
    assert Sampling.of(None) == Sampling() == Sampling(40, 1.0, None, None, 0, ())


def test_settings_come_from_some_of_their_fields_or_as_they_are() -> None:
    sampling = Sampling(max_new_tokens=7, stop=("a", "b"))
    assert Sampling.of(sampling) is sampling
    assert Sampling.of({"max_new_tokens": 7, "stop": ["a", "b"]}) == sampling
    assert Sampling.of(sampling.plain()) == sampling
    assert sampling.plain() == {
        "max_new_tokens": 7,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "min_new_tokens": 0,
        "stop": ["a", "b"],
    }


def test_one_stop_string_is_one_and_not_its_letters() -> None:
    assert Sampling(stop="###").stop == ("###",)


def test_an_unknown_setting_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(TypeError, match=r"`sampling` knows no \['max_length'\]: it takes \['max_new_tokens', 'min_new"):
        Sampling.of({"max_length": 7})


def test_changes_leave_the_rest_and_the_original_alone() -> None:
    sampling = Sampling(max_new_tokens=7, top_k=3)
    assert sampling.but({"temperature": 0.0}) == Sampling(max_new_tokens=7, top_k=3, temperature=0.0)
    assert sampling.but({"top_k": None}) == Sampling(max_new_tokens=7)
    assert sampling.but({"stop": "x"}).stop == ("x",)
    assert sampling.but(None) is sampling
    assert sampling.but({}) == sampling
    assert sampling.but(Sampling(max_new_tokens=2)) == Sampling(max_new_tokens=2)
    assert sampling == Sampling(max_new_tokens=7, top_k=3)


def test_what_cannot_be_trained_on_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`sampling.temperature=0` takes the likeliest token.*use 1"):
        Sampling(temperature=0.0).check_trainable()
    Sampling(temperature=0.5, min_new_tokens=3, stop="x").check_trainable()


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"top_p": 0.9}])
def test_what_narrows_the_policy_is_warned_of(fields: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"top_k=.*top_p=.*log-probs are those of the full"):
        Sampling(**fields).check_trainable()
