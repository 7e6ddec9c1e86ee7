"""Frozen blocks that run once, and what is made of their states."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_rlhf.functional.logprobs import response_inputs
from lightning_rlhf.models.activations import fuse_activations
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.hydra import reference_of
from lightning_rlhf.models.policy import Policy, PolicyOutput
from lightning_rlhf.models.probing import probe
from tests.models.test_hydra import LAYERS, NAMES, policy_of
from tests.models.test_reference import rollouts
from tests.networks import counting_gpt2, deep, network, tiny_gpt2

CLOSE = {"rtol": 0, "atol": 1e-5}


def with_trunk(policy: Policy) -> Any:
    """Rollouts with what the frozen blocks make of them."""
    batch = rollouts()
    tokens = response_inputs(batch.prompt_tokens, batch.response_tokens)
    mask = response_inputs(batch.prompt_mask, batch.response_mask)
    with torch.no_grad():
        return dataclasses.replace(batch, trunk=policy.decoder(tokens, mask, keep=1).trunk)


def precise(policy: Policy, name: str) -> Policy:
    """In double precision, or, where these models give NaN in it, padded, so that both ways round alike."""
    if name not in ("bloom", "gemma2", "mixtral"):
        return policy.double()
    policy.decoder.unpads = False
    return policy


def gradients(policy: Policy, output: PolicyOutput, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    (output.logprobs.sin() + output.values + 0.1 * output.entropy)[mask].sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:OpenAIGPTLMHeadModel cannot be decoded from a cache")
@pytest.mark.invariant(8, 12, 14)
@pytest.mark.parametrize("num_layers_unfrozen", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_that_begins_with_kept_states_is_the_whole_pass(name: str, num_layers_unfrozen: int) -> None:
    policy = precise(policy_of(deep(name), num_layers_unfrozen, temperature=0.7), name)
    reference = reference_of(policy, is_named=True)
    batch = with_trunk(policy)
    ran = []
    for block in policy.decoder.trunk.frozen:
        policy.decoder.model.get_submodule(block).register_forward_hook(lambda *_: ran.append(1))

    kept, whole = policy(batch), policy(rollouts())
    assert len(ran) == LAYERS - num_layers_unfrozen  # of the second pass alone
    mask = batch.response_mask
    for part in ("logprobs", "entropy", "values"):
        assert_close(getattr(kept, part)[mask], getattr(whole, part)[mask], **CLOSE)
    kept_gradients, whole_gradients = (gradients(policy, output, mask) for output in (kept, whole))
    assert kept_gradients.keys() == whole_gradients.keys()
    for key, gradient in whole_gradients.items():
        assert_close(kept_gradients[key], gradient, rtol=1e-5, atol=1e-5)

    assert_close(reference.logprobs(batch, 2), reference.logprobs(rollouts(), 2), **CLOSE)


@pytest.mark.invariant(12, 28)
def test_rows_and_columns_of_the_trunk_stay_with_their_tokens() -> None:
    policy = policy_of(deep("llama"), 1)
    batch = with_trunk(policy)
    rows = torch.tensor([3, 1])
    piece = batch.select(rows).trimmed()
    assert piece.trunk.shape[1] == piece.prompt_tokens.shape[1] + piece.response_tokens.shape[1] - 1
    assert piece.trunk.shape[1] < batch.trunk.shape[1]
    whole = policy(rollouts()).logprobs[rows][:, : piece.response_mask.shape[1]]
    assert_close(policy(piece).logprobs[piece.response_mask], whole[piece.response_mask], **CLOSE)


@pytest.mark.parametrize("num_layers_unfrozen", [-1, 0, LAYERS])
def test_nothing_is_kept_where_no_block_or_no_other_is_frozen(num_layers_unfrozen: int) -> None:
    policy = policy_of(tiny_gpt2(layers=LAYERS), num_layers_unfrozen)
    assert policy.decoder.trunk is None
    assert with_trunk(policy).trunk is None


def test_a_model_that_cannot_begin_in_its_middle_runs_whole() -> None:
    from lightning_rlhf.models.decoder import Decoder

    decoder = Decoder(counting_gpt2(layers=3))
    probe(decoder)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel cannot begin in its middle: its frozen blocks run in every"):
        freeze(decoder, 1)
    assert decoder.trunk is None


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neo", "openai_gpt", "bloom", "llama", "opt", "phi"])
def test_activations_of_one_operator_are_the_same_functions(name: str) -> None:
    model, tokens = network(deep(name)), torch.arange(8)[None]
    before = model(tokens).logits
    fuse_activations(model)
    assert_close(model(tokens).logits, before, **CLOSE)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "NewGELUActivation" not in kinds
    fused = [module for module in model.modules() if isinstance(module, nn.GELU)]
    assert bool(fused) == (name in ("gpt2", "gptj", "gpt_neo", "openai_gpt", "phi"))


@pytest.mark.filterwarnings("ignore:OpenAIGPTLMHeadModel cannot be decoded from a cache")
@pytest.mark.invariant(8, 15, 30)
@pytest.mark.parametrize("name", NAMES)
def test_the_head_reads_no_padding_and_nothing_else_changes(name: str) -> None:
    policy = policy_of(deep(name), -1, temperature=0.7)
    assert policy.decoder.chooses
    precise(policy, name)
    rows: list[int] = []
    head = policy.decoder.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1].numel()))
    batch = rollouts()
    mask = batch.response_mask
    policy.decoder.unpads = False
    few = policy(batch)
    policy.decoder.chooses = False
    all_of_them = policy(batch)
    handle.remove()
    # The first hook that was registered hears all that a pass hands to the head, before some of it is chosen.
    assert rows[-1] == mask.numel()
    assert few.logprobs[mask].numel() < mask.numel()
    for part in ("logprobs", "entropy", "values"):
        assert_close(getattr(few, part)[mask], getattr(all_of_them, part)[mask], **CLOSE)
        assert not getattr(few, part)[~mask].any()
    expected = gradients(policy, all_of_them, mask)
    for key, gradient in gradients(policy, few, mask).items():
        assert_close(gradient, expected[key], rtol=1e-5, atol=1e-5)


def test_a_head_that_wants_all_positions_gets_them() -> None:
    from lightning_rlhf.models.decoder import Decoder

    class Centred(nn.Linear):
        """Looks at all positions of a row."""

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            logits = super().forward(states)
            return logits - 0.5 * logits.cumsum(1)

    model = network(tiny_gpt2(tie_word_embeddings=False))
    model.lm_head.__class__ = Centred
    decoder = Decoder(model)
    decoder.pads = decoder.caches = False
    with pytest.warns(UserWarning, match="cannot be"):
        probe(decoder)
    assert not decoder.chooses
