"""One PPO step of every architecture with everything that may train of it, and every kind of critic."""

import re

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lightning_rlhf import ModelSpec, PPOModule
from tests.networks import WIDE, word_tokenizer
from tests.training import PROMPTS, fit, module_of

LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
POLICIES = {
    "full": {},
    "top block": {"num_layers_unfrozen": 1},
    "LoRA": {"adapter": LORA},
    "QLoRA": {"adapter": LORA, "quantization": "nf4"},
}
CRITICS = {
    "shared head": lambda folder: {},
    "value branch": lambda folder: {"num_value_layers_unfrozen": 1},
    "separate critic": lambda folder: {"critic": folder},
}

# The second of two blocks and what comes after it, less a tied head: read off the models' sources.
TOP = {
    "gpt2": r"transformer\.(h\.1|ln_f)\.",
    "gpt_neox": r"(gpt_neox\.(layers\.1|final_layer_norm)|lm_head)\.",
    "gptj": r"(transformer\.(h\.1|ln_f)|lm_head)\.",
    "llama": r"(model\.(layers\.1|norm)|lm_head)\.",
    "qwen3": r"(model\.(layers\.1|norm)|lm_head)\.",
    "gemma": r"model\.(layers\.1|norm)\.",
    "opt": r"model\.decoder\.(layers\.1|final_layer_norm)\.",
    "bloom": r"transformer\.(h\.1|ln_f)\.",
    "t5": r"decoder\.(block\.1|final_layer_norm)\.",
    "bart": r"model\.decoder\.layers\.1\.",
}
MODEL = "policy.decoder.model."
UPDATES = 2  # of an iteration: LoRA's first factor has no gradient before the second has moved


def at_rest_then_moving(optimizer):
    """The first iteration at learning rate 0, the second at the optimizer's."""
    return LambdaLR(optimizer, lambda updates: float(updates >= UPDATES))


def should_train(name, policy, module):
    """Names of parameters, by what the policy is told; critics train whole."""
    own = {key for key, _ in module.named_parameters() if key.startswith(MODEL)}
    critic = {key for key, _ in module.named_parameters()} - own
    assert critic
    if "adapter" in POLICIES[policy]:
        return {key for key in own if ".lora_" in key} | critic
    if policy == "top block":
        return {key for key in own if re.match(TOP[name], key.removeprefix(MODEL))} | critic
    return own | critic


def logits(model):
    tokens = torch.arange(12).reshape(2, 6)
    more = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits


def test_all_architectures_are_there():
    assert set(WIDE) == set(TOP)
    assert len(WIDE) == 10


@pytest.mark.invariant(9, 10, 13, 14, 18)
@pytest.mark.parametrize(
    "critic",
    [critic if critic == "shared head" else pytest.param(critic, marks=pytest.mark.slow) for critic in CRITICS],
)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", WIDE)
def test_a_step_moves_what_should_train_and_an_export_agrees(name, policy, critic, wide_folders, tmp_path):
    spec = ModelSpec(wide_folders[name], **POLICIES[policy])
    more = CRITICS[critic](wide_folders[name])
    module = module_of(PPOModule, spec, kl_coef=0.1, num_epochs=UPDATES, lr_scheduler=at_rest_then_moving, **more)
    module.configure_model()
    before = {key: parameter.detach().clone() for key, parameter in module.named_parameters()}
    seen = fit(module, iterations=2, prompts=PROMPTS[:4])
    resting, moving = seen.metrics
    assert all(abs(value) < float("inf") for metrics in seen.metrics for value in metrics.values())
    assert {"policy/loss", "value/loss", "optim/grad_norm"} <= set(moving)
    assert moving["optim/grad_norm"] > 0
    for metrics in (resting, moving):  # the second is measured before its updates
        assert metrics["kl/sequence"] == pytest.approx(0.0, abs=2e-5)
        assert metrics["policy/sampler_gap"] < 1e-5
    assert resting["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert resting["policy/clip_fraction"] == 0.0
    assert abs(moving["policy/ratio"] - 1.0) > 1e-6

    changed = {key for key, parameter in module.named_parameters() if not torch.equal(parameter, before[key])}
    expected = should_train(name, policy, module)
    # A key's bias adds the same to every score of a query, which softmax does not see.
    unseen = {key for key in expected if key.endswith("k_proj.bias")}
    assert changed - unseen == expected - unseen
    assert {key for key, parameter in module.named_parameters() if parameter.requires_grad} == expected

    module.save_pretrained(tmp_path / "out", **({"merge_adapter": True} if "adapter" in POLICIES[policy] else {}))
    auto = AutoModelForSeq2SeqLM if module.policy.decoder.has_encoder else AutoModelForCausalLM
    # In double precision, so that products do not round, but for those of quantised layers, which have no other.
    exported, policy_model = auto.from_pretrained(tmp_path / "out").double(), module.policy.decoder.model.eval()
    policy_says = logits(policy_model if "quantization" in POLICIES[policy] else policy_model.double())
    # Merged weights are rounded once more, and quantised layers multiply in another order.
    torch.testing.assert_close(logits(exported), policy_says.double(), rtol=0, atol=1e-5)


REFUSED = {
    "quantised, all to train": ({"quantization": "nf4"}, r"`quantization='nf4'` leaves \w+ nothing .* an `adapter`"),
    "quantised, a block to train": (
        {"quantization": "nf4", "num_layers_unfrozen": 1},
        r"`quantization='nf4'` leaves \w+ nothing to train.*give it an `adapter`, or `num_layers_unfrozen=0`",
    ),
    "an adapter and a block": (
        {"adapter": LORA, "num_layers_unfrozen": 1},
        "`num_layers_unfrozen=1` and `adapter` both say what trains: leave it out",
    ),
    "more blocks than there are": ({"num_layers_unfrozen": 3}, r"`num_layers_unfrozen=3` is more than the 2 blocks of"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", WIDE)
def test_what_makes_no_sense_is_refused_with_what_to_do_instead(name, what, wide_folders):
    arguments, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        module_of(PPOModule, {"model": str(wide_folders[name]), **arguments}).configure_model()


@pytest.mark.parametrize("name", WIDE)
def test_weights_that_are_in_no_folder_are_not_quantised(name):
    with pytest.raises(ValueError, match=r"`quantization='nf4'` .* `model` is a \w+Config: write it to a folder"):
        module_of(PPOModule, ModelSpec(WIDE[name](), adapter=LORA, quantization="nf4"), tokenizer=word_tokenizer())
