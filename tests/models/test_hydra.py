"""Frozen layers, and the reference that shares them."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_rlhf import ModelSpec, SFTModule
from lightning_rlhf.models.blocks import find_blocks, swapped
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.hydra import HydraReference, reference_of
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.reference import Reference, fingerprint
from tests.models.test_reference import BY_LENGTH, rollouts, scored
from tests.networks import ARCHITECTURES, MORE, USUAL, deep, network, tiny_gpt2, word_tokenizer

LAYERS = 4
# What runs after the last block, read off the models' sources; each has an `lm_head` besides.
AFTER = {
    "gpt2": ["transformer.ln_f"],
    "gptj": ["transformer.ln_f"],
    "gpt_neox": ["gpt_neox.final_layer_norm"],
    "opt": ["model.decoder.final_layer_norm", "model.decoder.project_out"],
    "bloom": ["transformer.ln_f"],
    "llama": ["model.norm"],
    "qwen3": ["model.norm"],
    "gemma": ["model.norm"],
    "mistral": ["model.norm"],
    "phi": ["model.final_layernorm"],
    "gemma2": ["model.norm"],
    "gpt_neo": ["transformer.ln_f"],
    "gpt_bigcode": ["transformer.ln_f"],
    "mixtral": ["model.norm"],
    "openai_gpt": [],
}
NAMES = [*USUAL, *MORE, "openai_gpt"]  # the last returns lists from its blocks and has no cache


def policy_of(config: Any, num_layers_unfrozen: int, temperature: float = 1.0) -> Policy:
    decoder = Decoder(network(config))
    probe(decoder)
    freeze(decoder, num_layers_unfrozen)
    return Policy(decoder, temperature, ValueHead(decoder.width)).eval()


def expected_to_train(name: str, model: nn.Module, num_layers_unfrozen: int) -> set[str]:
    names = {key for key, _ in model.named_parameters()}
    if num_layers_unfrozen == -1:
        return names
    if num_layers_unfrozen == 0:
        return set()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    after = [*AFTER[name], "lm_head"]

    def is_top(key: str) -> bool:
        block = re.search(r"\.(?:h|layers)\.(\d+)\.", key)
        if block:
            return int(block[1]) >= LAYERS - num_layers_unfrozen
        return any(key.startswith(f"{module}.") for module in after) and not (tied and key == "lm_head.weight")

    return {key for key in names if is_top(key)}


def step(policy: Policy) -> None:
    """Two steps that move whatever trains, by its gradient or by weight decay."""
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = policy(rollouts())
        (output.values - output.logprobs).mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:OpenAIGPTLMHeadModel cannot be decoded from a cache")
@pytest.mark.invariant(10, 11, 14)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("num_layers_unfrozen", [-1, 0, 1, 2, LAYERS])
@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_top_trains_and_the_reference_stays(name: str, num_layers_unfrozen: int, is_tied: bool) -> None:
    policy = policy_of(deep(name, tie_word_embeddings=is_tied), num_layers_unfrozen, temperature=0.7)
    model = policy.decoder.model
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    reference = reference_of(policy, is_named=True)
    assert isinstance(reference, HydraReference) == (num_layers_unfrozen != -1)
    at_start = reference.logprobs(rollouts(), 2)
    assert torch.equal(at_start, scored(policy, BY_LENGTH, 2))

    before = {key: parameter.detach().clone() for key, parameter in policy.named_parameters()}
    step(policy)
    changed = {key for key, parameter in policy.named_parameters() if not torch.equal(parameter, before[key])}
    top = {f"decoder.model.{key}" for key in expected_to_train(name, model, num_layers_unfrozen)}
    assert changed == top | {key for key in before if key.startswith("value_head.")}

    assert torch.equal(reference.logprobs(rollouts(), 2), at_start)
    moved = (scored(policy, BY_LENGTH, 2) - at_start).abs().max()
    assert moved == 0.0 if num_layers_unfrozen == 0 else moved > 1e-3


def test_the_hydra_reference_holds_copies_of_what_trains_and_nothing_more() -> None:
    policy = policy_of(tiny_gpt2(layers=LAYERS), 1)
    reference = reference_of(policy, is_named=True)
    model = policy.decoder.model
    assert reference.network.names == ["transformer.h.3", "transformer.ln_f"]  # the head is tied
    own = [p for p in reference.network.parameters() if all(p is not other for other in model.parameters())]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in reference.network.parameters())


def test_a_tied_head_with_a_bias_that_trains_shares_its_frozen_weight() -> None:
    model = network(ARCHITECTURES["gptj"](tie_word_embeddings=True))
    decoder = Decoder(model)
    probe(decoder)
    freeze(decoder, 1)
    reference = reference_of(Policy(decoder), is_named=True)
    head = dict(zip(reference.network.names, reference.network.copies, strict=True))["lm_head"]
    assert head.weight is model.get_input_embeddings().weight
    assert head.bias is not model.lm_head.bias
    assert torch.equal(head.bias, model.lm_head.bias)


def test_the_policy_is_itself_again_after_the_reference_was_asked() -> None:
    policy = policy_of(tiny_gpt2(layers=LAYERS), 2).train()
    modules = dict(policy.named_modules())
    reference = reference_of(policy, is_named=True)
    with pytest.raises(IndexError):
        reference.logprobs(rollouts().select(torch.tensor([99])), 2)
    reference.logprobs(rollouts(), 2)
    assert dict(policy.named_modules()) == modules
    assert policy.training
    assert all(module.training for module in policy.modules())


def test_dropout_is_off_for_the_reference_on_a_trunk_that_keeps_its_own() -> None:
    policy = policy_of(tiny_gpt2(layers=LAYERS, resid_pdrop=0.5), 1).train()
    reference = reference_of(policy, is_named=True)
    assert torch.equal(reference.logprobs(rollouts(), 2), reference.logprobs(rollouts(), 2))


@pytest.mark.invariant(10, 11, 14)
def test_a_trunk_that_holds_what_trains_cannot_be_shared() -> None:
    model = AutoModelForCausalLM.from_config(deep("bloom"))
    model.transformer.word_embeddings_layernorm.weight = model.transformer.ln_f.weight
    decoder = Decoder(model)
    probe(decoder)
    with pytest.warns(UserWarning, match="BloomForCausalLM cannot begin in its middle"):
        freeze(decoder, 1)
    assert decoder.trunk is None
    policy = Policy(decoder, value_head=ValueHead(decoder.width)).eval()
    with pytest.warns(UserWarning, match="BloomForCausalLM cannot be split into a frozen trunk and what trains"):
        reference = reference_of(policy, is_named=True)
    assert type(reference) is Reference
    at_start = reference.logprobs(rollouts(), 2)
    assert torch.equal(at_start, scored(policy, BY_LENGTH, 2))
    step(policy)
    assert torch.equal(reference.logprobs(rollouts(), 2), at_start)


def test_a_model_whose_blocks_are_not_found_can_be_trained_whole_only() -> None:
    model = network(tiny_gpt2(layers=3))
    decoder = Decoder(model)
    decoder.blocks = find_blocks(model, 2, lambda: decoder(*decoder.sample(), keep=1))
    assert decoder.blocks is None
    freeze(decoder, -1)
    with pytest.raises(ValueError, match="`num_layers_unfrozen=1`: the blocks of GPT2LMHeadModel were not found"):
        freeze(decoder, 1)


def test_experts_are_not_taken_for_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return states + self.experts[1](self.experts[0](states))

    model = network(tiny_gpt2())
    model.transformer.h[0] = Block()
    decoder = Decoder(model)
    blocks = find_blocks(model, 2, lambda: decoder(*decoder.sample(), keep=1))
    assert blocks.blocks == ("transformer.h.0", "transformer.h.1")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (5, "`num_layers_unfrozen=5` is more than the 4 blocks of GPT2LMHeadModel: use -1"),
        (-2, "`num_layers_unfrozen=-2` must be a number of blocks, or -1 for everything"),
    ],
)
def test_a_count_of_blocks_that_there_are_not(count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTModule(
            ModelSpec(tiny_gpt2(layers=4), num_layers_unfrozen=count), tokenizer=word_tokenizer()
        ).configure_model()


def test_an_unnamed_hydra_reference_takes_its_weights_with_it() -> None:
    policy = policy_of(tiny_gpt2(layers=LAYERS), 2)
    reference = reference_of(policy, is_named=False)
    before, state = reference.logprobs(rollouts(), 2), {**reference.state_dict()}
    step(policy)
    other = reference_of(policy, is_named=False)
    assert not torch.equal(other.logprobs(rollouts(), 2), before)
    other.load_state_dict(state)
    other.check()
    assert torch.equal(other.logprobs(rollouts(), 2), before)
    assert state["fingerprint"] == fingerprint(other.network)


def test_modules_are_swapped_by_name_and_back_even_if_something_fails() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    inner, other = model[1][0], nn.Identity()
    with swapped(model, {"1.0": other}):
        assert model[1][0] is other
    assert model[1][0] is inner
    with pytest.raises(RuntimeError), swapped(model, {"1.0": nn.Linear(7, 7)}):
        model(torch.zeros(1, 1))
    assert model[1][0] is inner
