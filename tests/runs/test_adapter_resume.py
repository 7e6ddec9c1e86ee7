"""A run with an adapter that was cut and resumed is the run that was not."""

from dataclasses import replace

import pytest

from lightning_rlhf import ModelSpec
from tests.networks import network, tiny_gpt2, word_tokenizer
from tests.runs.recording import CASES, assert_goes_on, checkpoint, run
from tests.runs.test_resume import LONG, Everywhere

pytestmark = [
    pytest.mark.invariant(36),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 26, "tinit": 4, "tfinal": 4}
LORA = {"peft_type": "LORA", "r": 4}
SPECS = {
    "lora": ("ppo", {"adapter": LORA}),
    "top": ("grpo", {"adapter": {**LORA, "layers_to_transform": [1]}}),
    "pissa": ("ppo", {"adapter": {**LORA, "init_lora_weights": "pissa"}}),
    "adalora": ("ppo", {"adapter": {**ADALORA, "deltaT": 3}}),
    "quantised": ("grpo", {"adapter": LORA, "quantization": "nf4-dq"}),
    "imitating": ("sft", {"adapter": {**LORA, "lora_dropout": 0.2}, "gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    network(tiny_gpt2(width=64)).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", SPECS)
def test_a_resumed_run_with_an_adapter_equals_an_uninterrupted_one(name, folder, tmp_path):
    algorithm, arguments = SPECS[name]
    case = CASES[algorithm]
    case = replace(case, arguments={**case.arguments, "policy": ModelSpec(folder, **arguments)})
    whole = run(case, callbacks=[Everywhere(tmp_path)], **LONG)
    assert len({place["weights"] for place in whole.places}) == 9
    saved = checkpoint(tmp_path / "batch=5.ckpt")
    assert set(saved["state_dict"]) == {n for n, p in whole.module.named_parameters() if p.requires_grad}
    if name == "adalora":
        assert saved["lightning_rlhf"]["adapter"]["updates"] == 18  # of the 22 after which ranks are what they will be
        assert whole.places[-1]["global_step"] > 22
        assert whole.module.policy.decoder.adapters.config.rank_pattern
    for cut, done in {"batch=5": 5, "epoch=6": 6}.items():
        assert_goes_on(whole, run(case, tmp_path / f"{cut}.ckpt", **LONG), done)
