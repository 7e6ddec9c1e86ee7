"""Compiled blocks: the same training, and not compiled anew whenever lengths differ."""

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_rlhf import PPOModule
from lightning_rlhf.models.decoder import Decoder
from tests.networks import tiny_gpt2
from tests.training import fit, module_of, weights

# Traces forward and backward as for a GPU, and runs what it traced in torch's own operators: no C++ compiler is needed.
TRACED = {"backend": "aot_eager"}


def trained(**arguments):
    module = module_of(PPOModule, tiny_gpt2(initializer_range=0.3), micro_batch_size=1, **arguments)
    fit(module, iterations=3)
    return weights(module)


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
