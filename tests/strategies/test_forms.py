"""Networks that leave their process without their weights."""

import copy

import pytest
import torch
from torch import nn

from lightning_rlhf import ModelSpec, PPOModule
from lightning_rlhf.modules.building import networks_of
from lightning_rlhf.strategies.forms import form_of, of_form
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, MORE, USUAL, tiny_gpt2
from tests.training import module_of

KINDS = {
    **{name: ({"num_layers_unfrozen": 1}, ARCHITECTURES[name]) for name in [*USUAL, *MORE]},
    **{name: ({}, ENCODER_DECODERS[name]) for name in ENCODER_DECODERS},
    "everything": ({}, ARCHITECTURES["llama"]),
    "checkpointed": ({"gradient_checkpointing": True}, ARCHITECTURES["qwen3"]),
    "lora": ({"adapter": {"peft_type": "LORA", "r": 2, "init_lora_weights": False}}, tiny_gpt2),
    "dora": ({"adapter": {"peft_type": "LORA", "r": 2, "use_dora": True}}, ARCHITECTURES["llama"]),
}


@pytest.mark.filterwarnings("ignore:.*cannot begin in its middle")
@pytest.mark.parametrize("name", KINDS)
def test_a_form_with_its_weights_put_back_says_what_was_built(name):
    more, config = KINDS[name]
    module = module_of(PPOModule, ModelSpec(config(), **more), kl_coef=0.1)
    module.configure_model()
    built = module.built()
    form = form_of(built)
    weights = sum(p.numel() * p.element_size() for network in networks_of(built) for p in network.parameters())
    again = of_form(form)
    sources, targets = networks_of(built), networks_of(again)
    assert len(sources) == len(targets)
    for source, target in zip(sources, targets, strict=True):
        assert all(parameter.is_meta for parameter in target.parameters())
        flags = [[(name, p.requires_grad) for name, p in n.named_parameters()] for n in (source, target)]  # ties too
        assert flags[0] == flags[1]
        _put_back(source, target)
    assert weights > 0
    policy, other = built["policy"], again["policy"]
    tokens, mask = policy.decoder.sample()
    logits = [p.decoder.eval()(tokens, mask, keep=4).logits for p in (policy, other)]
    assert torch.equal(logits[0], logits[1])  # rotary frequencies, which no file holds, included
    assert other.decoder.trunk is None or vars(other.decoder.trunk) == vars(policy.decoder.trunk)
    assert again["reference"].reader is (other if built["reference"].reader is policy else again["reference"].network)
    for reference in (built["reference"], again["reference"]):
        reader = reference.reader.eval()
        with torch.no_grad(), reference.in_place():
            logits.append(reader.decoder(tokens, mask, keep=4).logits)
    assert torch.equal(logits[2], logits[3])
    assert not logits[3].requires_grad


def _put_back(source, target):
    values = dict(source.named_parameters(remove_duplicate=False))
    kept = {}
    for prefix, module in target.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = values[f"{prefix}.{name}".lstrip(".")]
                kept.setdefault(id(parameter), nn.Parameter(value.detach().clone(), parameter.requires_grad))
                module._parameters[name] = kept[id(parameter)]


def test_a_form_takes_the_memory_of_no_weight():
    small, large = (form_of(nn.ModuleList([nn.Linear(width, width), nn.BatchNorm1d(width)])) for width in (8, 512))
    assert len(large) - len(small) < 3 * 4 * 512 + 1000  # the buffers alone


def test_what_is_one_parameter_is_one_again():
    layer = nn.Linear(3, 3)
    both = of_form(form_of({"first": layer, "list": [layer.weight, copy.copy(layer)]}))
    assert both["first"].weight is both["list"][0] is both["list"][1].weight
    assert both["first"].bias.is_meta
