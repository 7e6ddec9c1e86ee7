"""Compiled blocks: the same training, and not compiled anew whenever lengths differ."""

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_rlhf import ModelSpec, PPOModule
from lightning_rlhf.models.decoder import Decoder
from tests.networks import tiny_gpt2
from tests.training import PROMPTS, fit, module_of, weights

# Traces forward and backward as for a GPU, and runs what it traced in torch's own operators: no C++ compiler is needed.
TRACED = {"backend": "aot_eager"}


def trained(**arguments):
    module = module_of(PPOModule, tiny_gpt2(initializer_range=0.3), micro_batch_size=1, **arguments)
    fit(module, iterations=3)
    return weights(module)


LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "init_lora_weights": False}
KINDS = {
    "critic": ({}, "policy", 0.0),
    "value_adapter": ({"adapter": LORA}, "policy", 0.1),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # tracing warns of what is torch's own
@pytest.mark.parametrize("kind", KINDS)
def test_what_says_values_is_compiled_too_and_learns_the_same(kind):
    more, critic, kl_coef = KINDS[kind]

    def run(**arguments):
        spec = ModelSpec(tiny_gpt2(layers=1, initializer_range=0.3), **more)
        module = module_of(
            PPOModule, spec, critic=critic, num_epochs=1, micro_batch_size=1, kl_coef=kl_coef, **arguments
        )
        metrics = fit(module, iterations=2, prompts=PROMPTS[:3]).metrics[-1]
        values = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        return values, metrics["value/loss"], module

    expected, loss, _ = run()
    torch._dynamo.reset()
    counters.clear()
    found, compiled_loss, module = run(compile=TRACED)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["recompile_limit"]
    assert (module.critic or module.policy).decoder.is_compiled
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert compiled_loss == pytest.approx(loss, abs=1e-5)


@pytest.mark.filterwarnings("default")  # tracing warns of what is torch's own
def test_compiled_blocks_learn_the_same_and_are_compiled_once():
    expected = trained()
    torch._dynamo.reset()
    counters.clear()
    found = trained(compile=TRACED)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["recompile_limit"]
    once = counters["stats"]["unique_graphs"]
    # Eighteen rows went by, of many lengths, in at most a graph for one token and one for more.
    assert once <= 12
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_blocks_that_were_not_found_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr(Decoder, "find_blocks", lambda self: None)
    for given, said in ((True, "True"), (TRACED, r"\{'backend': 'aot_eager'\}")):
        module = module_of(PPOModule, tiny_gpt2(), compile=given)
        with pytest.raises(ValueError, match=f"`compile={said}`: the blocks of GPT2LMHeadModel were not found: leave"):
            module.configure_model()
