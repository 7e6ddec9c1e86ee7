"""Gradient checkpointing: blocks run again in the backward pass of training, and nowhere else."""

from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf import ModelSpec, PPOModule
from lightning_rlhf.models.recomputation import recompute_activations
from tests.models.test_reference import rollouts
from tests.networks import ARCHITECTURES, MORE, USUAL, deep, network
from tests.training import fit, module_of

# Blocks of four, and what of them trains: all, the top two, an adapter in all of them.
TRAINS = {"all": {}, "top": {"num_layers_unfrozen": 2}, "adapter": {"adapter": {"peft_type": "LORA", "r": 2}}}


def module_on(name, critic=None, **more):
    spec = ModelSpec(network(deep(name)), **more)
    module = module_of(PPOModule, spec, critic=critic, kl_coef=0.1)
    module.configure_model()
    return module


class Runs(Counter):
    """How often the forward of every block ran, those of the backward pass included."""

    def __init__(self, decoder):
        super().__init__()
        for i, name in enumerate(decoder.blocks.blocks):
            block = decoder.model.get_submodule(name)
            inner = next(child for child in block.modules() if not list(child.children()))
            inner.register_forward_pre_hook(lambda *_, i=i: self.update([i]))


def moved(plain, checked):
    """Lets both have the same weights, in which nothing is 0."""
    with torch.no_grad():
        for mine, other in zip(plain.policy.parameters(), checked.policy.parameters(), strict=True):
            assert torch.equal(mine, other)
            mine.add_(0.01 * torch.randn_like(mine))
            other.copy_(mine)


def gradients(module):
    module.policy.zero_grad()
    output = module.policy(rollouts())
    (output.values - output.logprobs).mean().backward()
    return {n: p.grad.clone() for n, p in module.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_blocks_that_train_run_twice_and_give_the_same_gradients(name, trains):
    plain, checked = (module_on(name, gradient_checkpointing=flag, **TRAINS[trains]) for flag in (False, True))
    assert checked.policy.training  # as Lightning finds it, and leaves it
    moved(plain, checked)
    once, twice = Runs(plain.policy.decoder), Runs(checked.policy.decoder)
    expected, got = gradients(plain), gradients(checked)
    assert expected.keys() == got.keys()
    for key, gradient in expected.items():
        assert_close(got[key], gradient, rtol=1e-6, atol=1e-6)
    frozen = range(2) if trains == "top" else ()
    assert once == dict.fromkeys(range(4), 1)
    assert twice == {i: 1 if i in frozen else 2 for i in range(4)}
    twice.clear()
    checked.reference.logprobs(rollouts(), 5)
    checked.generate(["a b"], {"max_new_tokens": 1, "min_new_tokens": 1})
    assert max(twice.values()) <= 3  # one pass to judge, one to write, and at most one for the second token
    assert checked.policy.training


@pytest.mark.invariant(13)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_block_runs_again_with_the_adapter_with_which_it_ran(name):
    plain, checked = (module_on(name, "policy", gradient_checkpointing=flag, **TRAINS["adapter"]) for flag in (0, 1))
    moved(plain, checked)
    runs = Runs(checked.policy.decoder)
    expected, got = gradients(plain), gradients(checked)
    assert set(runs.values()) == {4}
    assert expected.keys() == got.keys() == {n for n, p in plain.policy.named_parameters() if p.requires_grad}
    for key, gradient in expected.items():
        assert gradient.abs().max() > 1e-5
        assert_close(got[key], gradient, rtol=1e-6, atol=1e-6)
    adapters = checked.policy.decoder.adapters
    assert adapters.on == adapters.peft.active_adapter == "default"


@pytest.mark.parametrize("name", [*USUAL, *MORE])
def test_every_architecture_can(name):
    model = network(ARCHITECTURES[name]()).train()
    recompute_activations(model)
    ids = torch.tensor([[1, 2, 3]])
    runs = Counter()
    for module in model.modules():
        if type(module).__name__.endswith(("MLP", "Attention", "MoeBlock", "SparseMoeBlock")):
            module.register_forward_pre_hook(lambda *_, module=module: runs.update([module]))
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert runs
    assert set(runs.values()) == {2}


def test_a_model_that_cannot_is_refused():
    model = network(ARCHITECTURES["openai_gpt"]())
    with pytest.raises(ValueError, match="`gradient_checkpointing=True`: the blocks of OpenAIGPTLMHeadModel hold"):
        recompute_activations(model)


def test_a_run_comes_to_the_same_with_and_without():
    weights = []
    for flag in (False, True):
        module = module_of(PPOModule, ModelSpec(deep("llama"), gradient_checkpointing=flag, num_layers_unfrozen=2))
        fit(module, iterations=2)
        weights.append(torch.cat([p.detach().flatten() for p in module.policy.parameters()]))
    assert_close(weights[1], weights[0], rtol=0, atol=1e-6)
