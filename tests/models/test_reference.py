"""The frozen model: the policy as it was, whatever the policy becomes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.reference import Reference, fingerprint
from tests.networks import ARCHITECTURES, MORE, USUAL, network, random_rows, tiny_gpt2, written

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PROMPTS = random_rows([3, 9, 1, 6, 2], seed=1)
RESPONSES = random_rows([5, 2, 7, 1, 7], seed=2)
BY_LENGTH = [3, 1, 0, 2, 4]


def rollouts() -> Rollouts:
    return written(PROMPTS, RESPONSES)


def policy_of(config: Any, temperature: float = 1.0) -> Policy:
    decoder = Decoder(network(config))
    return Policy(decoder, temperature, ValueHead(decoder.width))


def scored(policy: Policy, order: list[int], batch_size: int) -> Tensor:
    """A scoring pass over rows in this order, so many at a time, each time as wide as the longest of them.

    Where padding costs nothing they are taken as they come.
    """
    order = sorted(order) if policy.decoder.line(rollouts()) is not None else order
    logprobs = torch.zeros(len(PROMPTS), max(map(len, RESPONSES)))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with torch.no_grad():
            piece = policy(written([PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows])).logprobs
        for i, row in zip(rows, piece, strict=True):
            logprobs[i, : len(RESPONSES[i])] = row[: len(RESPONSES[i])]
    return logprobs


def train(policy: Policy, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        output = policy(rollouts())
        (output.values - output.logprobs).mean().backward()
        optimizer.step()


@pytest.mark.invariant(10, 16)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_divergence_is_exactly_0_at_the_start(is_tied: bool, batch_size: int) -> None:
    policy = policy_of(tiny_gpt2(tie_word_embeddings=is_tied), temperature=0.7)
    reference = Reference.copied_from(policy, is_named=True)
    got = reference.logprobs(rollouts(), batch_size)
    assert torch.equal(got, scored(policy, BY_LENGTH, batch_size))
    assert_close(got, scored(policy, [0, 1, 2, 3, 4], 5), **CLOSE)
    assert (got != 0).tolist() == rollouts().response_mask.tolist()


@pytest.mark.invariant(10)
@pytest.mark.parametrize("name", [*USUAL, *MORE])
def test_the_divergence_is_0_at_the_start_whatever_the_model(name: str) -> None:
    policy = policy_of(ARCHITECTURES[name]())
    reference = Reference.copied_from(policy, is_named=True)
    assert torch.equal(reference.logprobs(rollouts(), 2), scored(policy, BY_LENGTH, 2))


@pytest.mark.invariant(11)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_reference_stays_while_the_policy_goes(is_tied: bool) -> None:
    policy = policy_of(tiny_gpt2(tie_word_embeddings=is_tied))
    reference = Reference.copied_from(policy, is_named=True)
    before, name = reference.logprobs(rollouts(), 2), fingerprint(reference.network)
    train(policy)
    assert torch.equal(reference.logprobs(rollouts(), 2), before)
    assert fingerprint(reference.network) == name
    assert float((scored(policy, BY_LENGTH, 2) - before).abs().max()) > 0.1
    for weight in (policy.decoder.model.get_input_embeddings(), policy.decoder.model.get_output_embeddings()):
        assert all(weight.weight is not other for other in reference.network.parameters())


def test_the_reference_is_frozen_and_the_policy_is_not() -> None:
    policy = policy_of(tiny_gpt2()).train()
    reference = Reference.copied_from(policy, is_named=True)
    assert not any(parameter.requires_grad for parameter in reference.network.parameters())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not any(module.training for module in reference.network.modules())
    assert all(module.training for module in policy.modules())
    assert not reference.logprobs(rollouts(), 2).requires_grad


def test_the_reference_has_no_value_head() -> None:
    reference = Reference.copied_from(policy_of(tiny_gpt2()), is_named=True)
    assert reference.network.value_head is None


def test_the_reference_stays_out_of_the_module_that_holds_it() -> None:
    module = nn.Module()
    module.policy = policy_of(tiny_gpt2())
    names = set(module.state_dict())
    module.reference = Reference.copied_from(module.policy, is_named=True)
    assert set(module.state_dict()) == names


@pytest.mark.invariant(14)
def test_the_reference_can_do_what_the_policy_was_found_to_do() -> None:
    policy = policy_of(ARCHITECTURES["rwkv"]())
    policy.decoder.pads = policy.decoder.caches = False
    reference = Reference.copied_from(policy, is_named=True)
    assert (reference.network.decoder.pads, reference.network.decoder.caches) == (False, False)
    with pytest.raises(ValueError, match="`policy=RwkvForCausalLM` cannot be padded"):
        reference.logprobs(rollouts(), 5)
    assert_close(reference.logprobs(rollouts(), 1), scored(policy, BY_LENGTH, 1), **CLOSE)


def test_half_precision_references_give_single_precision_logprobs() -> None:
    policy = Policy(Decoder(network(tiny_gpt2()).bfloat16()))
    logprobs = Reference.copied_from(policy, is_named=True).logprobs(rollouts(), 5)
    assert logprobs.dtype == torch.float32


@pytest.mark.invariant(8)
def test_what_lies_in_the_padding_changes_no_reference_logprob() -> None:
    reference = Reference.copied_from(policy_of(tiny_gpt2()), is_named=True)
    dirty = rollouts()
    dirty.prompt_tokens[~dirty.prompt_mask] = -100
    dirty.response_tokens[~dirty.response_mask] = -100
    dirty.old_logprobs[~dirty.response_mask] = float("nan")
    assert torch.equal(reference.logprobs(dirty, 2), reference.logprobs(rollouts(), 2))


def test_a_fingerprint_names_the_weights_and_nothing_else() -> None:
    model = network(tiny_gpt2())
    name = fingerprint(model)
    assert len(name) == 16
    assert int(name, 16) >= 0
    assert fingerprint(model) == name
    assert fingerprint(copy.deepcopy(model).train().requires_grad_(False)) == name
    assert fingerprint(network(tiny_gpt2())) == name
    assert fingerprint(network(tiny_gpt2(), seed=1)) != name


@pytest.mark.parametrize(
    "which", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.weight"]
)
def test_a_fingerprint_changes_with_the_last_bit_of_any_weight(which: str) -> None:
    model = network(tiny_gpt2())
    name = fingerprint(model)
    weight = model.get_parameter(which).data.view(-1)
    old = weight[-1].item()
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))
    assert fingerprint(model) != name
    weight[-1] = old
    assert fingerprint(model) == name


def test_a_fingerprint_tells_apart_what_swapped_places() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    assert fingerprint(nn.Sequential(first, second)) != fingerprint(nn.Sequential(second, first))
    flat = nn.Linear(2, 3, bias=False)
    turned = nn.Linear(3, 2, bias=False)
    turned.weight.data = flat.weight.data.reshape(2, 3)
    assert fingerprint(flat) != fingerprint(turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_is_of_any_dtype_and_of_buffers_too(dtype: torch.dtype) -> None:
    module = nn.BatchNorm1d(3).to(dtype)  # one of its buffers is a single number
    name = fingerprint(module)
    module.num_batches_tracked += 1
    assert fingerprint(module) != name


def test_a_named_reference_keeps_its_name_only_and_knows_itself_again() -> None:
    policy = policy_of(tiny_gpt2())
    reference = Reference.copied_from(policy, is_named=True)
    state = reference.state_dict()
    assert set(state) == {"fingerprint"}
    same = Reference.copied_from(policy, is_named=True)
    same.load_state_dict(state)
    same.check()
    train(policy, steps=1)
    other = Reference.copied_from(policy, is_named=True)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="`reference` is not the one that the checkpoint was trained against"):
        other.check()


def test_an_unnamed_reference_takes_its_weights_with_it() -> None:
    policy = policy_of(tiny_gpt2())
    reference = Reference.copied_from(policy, is_named=False)
    before, state = reference.logprobs(rollouts(), 2), copy.deepcopy(reference.state_dict())
    train(policy, steps=1)
    other = Reference.copied_from(policy, is_named=False)
    assert not torch.equal(other.logprobs(rollouts(), 2), before)
    other.load_state_dict(state)
    assert torch.equal(other.logprobs(rollouts(), 2), before)
