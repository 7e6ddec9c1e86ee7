"""What is said of rows that come part by part is what torch says of whole rows."""

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.functional.running_softmax import RunningSoftmax

ROWS, ENTRIES = 6, 30


def read(logits, chosen, temperature=1.0, width=7, keeps=False, order=None, dtype=torch.float64, at_once=2**19):
    seen, kept = RunningSoftmax(chosen, temperature, dtype, at_once), []
    starts = list(range(0, logits.shape[1], width))
    for start in starts if order is None else [starts[i] for i in order]:
        part = logits[:, start : start + width]
        masses = torch.empty_like(part) if keeps else None
        seen.add(part, start, masses)
        kept.append((start, masses, seen.top))
    return seen, kept


def given(scale=1.0, dtype=torch.float64):
    torch.manual_seed(0)
    return (scale * torch.randn(ROWS, ENTRIES)).to(dtype), torch.randint(ENTRIES, (ROWS,))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize(("width", "at_once"), [(1, 1), (7, 21), (30, 10**6)])
def test_log_probs_and_entropies_are_those_of_whole_rows(width, at_once, temperature, scale):
    logits, chosen = given(scale)
    seen, _ = read(logits, chosen, temperature, width, at_once=at_once)
    logprobs, entropy = seen.outputs((ROWS,))
    expected = torch.distributions.Categorical(logits=logits / temperature)
    assert_close(logprobs, expected.log_prob(chosen), rtol=1e-12, atol=1e-12)
    assert_close(entropy, expected.entropy(), rtol=1e-10, atol=1e-12)
    assert_close(seen.top + seen.mass.log(), (logits / temperature).logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_parts_come_in_any_order_and_what_is_kept_becomes_the_softmax(order):
    logits, chosen = given(20.0)
    seen, kept = read(logits, chosen, temperature=0.7, order=order, keeps=True)
    expected = (logits / 0.7).softmax(-1)
    for start, masses, top in kept:
        found = masses * ((top - seen.top).exp() / seen.mass)[:, None]
        assert_close(found, expected[:, start : start + masses.shape[1]], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shut", [slice(0, 7), slice(7, 30), slice(3, 10)])
def test_what_cannot_be_drawn_adds_nothing(shut):
    logits, chosen = given()
    logits[:, shut] = -torch.inf
    outside = [i for i in range(ENTRIES) if not shut.start <= i < shut.stop]
    seen, kept = read(logits, chosen, keeps=True)
    logprobs, entropy = seen.outputs((ROWS,))
    expected = torch.distributions.Categorical(logits=logits[:, outside])
    assert_close(entropy, expected.entropy(), rtol=1e-12, atol=1e-12)
    assert_close(logprobs, logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1), rtol=1e-12, atol=1e-12)
    masses = torch.cat([part * ((top - seen.top).exp() / seen.mass)[:, None] for _, part, top in kept], dim=1)
    assert_close(masses.sum(-1), torch.ones(ROWS, dtype=torch.float64))
    assert (masses[:, shut] == 0).all()


def test_half_precision_is_added_up_in_single_precision():
    logits, chosen = given(dtype=torch.bfloat16)
    seen, _ = read(logits, chosen, temperature=0.5, dtype=torch.float32)
    logprobs, entropy = seen.outputs((ROWS,))
    assert logprobs.dtype == torch.float32
    expected = torch.distributions.Categorical(logits=logits.float() / 0.5)
    assert_close(logprobs, expected.log_prob(chosen), rtol=1e-6, atol=1e-5)
    assert_close(entropy, expected.entropy(), rtol=1e-6, atol=1e-5)


def test_one_entry_is_certain():
    seen, _ = read(torch.tensor([[3.0], [-1e30]], dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    logprobs, entropy = seen.outputs((1, 2))
    assert logprobs.tolist() == entropy.tolist() == [[0.0, 0.0]]
