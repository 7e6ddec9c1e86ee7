"""Runs in which an adapter learns, on whole and on quantised models; what they leave, and what is refused."""

import pytest
import torch
import yaml
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from peft import AutoPeftModelForCausalLM, LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lightning_rlhf import ConversationDataModule, GRPOModule, ModelSpec, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.cli import main
from lightning_rlhf.models.adapter_reference import AdapterReference
from lightning_rlhf.models.reference import Reference, fingerprint
from tests.networks import ENCODER_DECODERS, WIDE, network, tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, bare_trainer, fit, module_of, sgd, share_of_early_letters

LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
IDS = torch.tensor([[1, 2, 3, 4]])
FAMILIES = [name for name in WIDE if name not in ENCODER_DECODERS]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.invariant(9, 10, 13, 18)
@pytest.mark.parametrize(
    ("name", "cls", "quantization"),
    [(name, PPOModule, "int8") for name in FAMILIES]
    + [(name, GRPOModule, quantization) for name in ("gpt2", "llama") for quantization in (None, "nf4", "int8")],
)
def test_an_adapter_learns_online(name, cls, quantization, wide_folders, tmp_path):
    spec = ModelSpec(wide_folders[name], adapter=LORA, quantization=quantization)
    module = module_of(cls, spec, kl_coef=0.1, num_epochs=1, minibatch_size=64, optimizer=sgd)
    module.configure_model()
    assert isinstance(module.reference, AdapterReference)
    before = {n: p.clone() for n, p in module.named_parameters()}
    seen = fit(module, iterations=2, prompts=PROMPTS[:3])
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=2e-5)
    assert seen.metrics[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert seen.metrics[0]["policy/sampler_gap"] < 1e-5
    assert all(torch.tensor(value).isfinite() for metrics in seen.metrics for value in metrics.values())
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    heads = {n for n in before if "value_head" in n}
    assert changed <= {n for n in before if ".lora_" in n} | heads
    assert len(changed - heads) >= 2 * 4

    module.save_pretrained(tmp_path / "out", merge_adapter=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(logits(again), logits(module.policy.decoder.model.eval()), rtol=0, atol=1e-4)


def test_supervised_training_gives_an_adapter_from_which_reinforcement_goes_on(wide_folders, tmp_path):
    """The reference is then the adapter that it went on from."""
    module = SFTModule(
        ModelSpec(wide_folders["gpt2"], adapter=LoraConfig(r=4, lora_dropout=0.1)), optimizer=sgd, seed=1
    )
    bare_trainer(max_epochs=2).fit(module, datamodule=ConversationDataModule(["a b c d", "b c"]))
    module.save_pretrained(tmp_path / "sft")
    assert not (tmp_path / "sft" / "config.json").exists()
    by_peft = AutoPeftModelForCausalLM.from_pretrained
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        imitated = logits(by_peft(tmp_path / "sft"))
    assert_close(imitated, logits(module.policy.decoder.model.eval()), rtol=0, atol=1e-4)

    spec = ModelSpec(wide_folders["gpt2"], adapter=tmp_path / "sft")
    module = module_of(PPOModule, spec, kl_coef=0.1)
    seen = fit(module, iterations=2)
    assert module.reference.adapter == "reference"
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=2e-5)
    assert abs(seen.metrics[1]["kl/sequence"]) > 1e-3
    off = module_of(PPOModule, spec, kl_coef=0.1, reference=wide_folders["gpt2"])
    off.configure_model()
    assert (type(off.reference), off.reference.adapter) == (AdapterReference, None)
    named = module_of(PPOModule, ModelSpec(wide_folders["gpt2"], adapter=LORA), kl_coef=0.1, reference={**spec.plain()})
    named.configure_model()
    assert named.reference.adapter == "reference"
    other = module_of(PPOModule, spec, kl_coef=0.1, reference=wide_folders["llama"])
    other.configure_model()
    assert type(other.reference) is Reference


@pytest.mark.invariant(36)
def test_a_checkpoint_holds_what_trains_and_no_other_model_takes_it(wide_folders, tmp_path):
    spec = ModelSpec(wide_folders["gpt2"], adapter=LORA, quantization="nf4")
    module = module_of(PPOModule, spec, kl_coef=0.1, reward=share_of_early_letters)
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=6))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {n for n, p in module.named_parameters() if p.requires_grad}
    assert saved["hyper_parameters"]["policy"]["adapter"]["r"] == 4
    loaded = PPOModule.load_from_checkpoint(tmp_path / "a.ckpt", tokenizer=word_tokenizer())
    assert fingerprint(loaded.policy) == fingerprint(module.policy)
    assert loaded.spec.quantization == "nf4"

    def resumed(policy, path=tmp_path / "a.ckpt"):
        module = module_of(PPOModule, policy, kl_coef=0.1, reward=share_of_early_letters)
        data = PromptDataModule(PROMPTS, batch_size=6)
        bare_trainer(max_epochs=2).fit(module, datamodule=data, ckpt_path=path)
        return module

    assert resumed(spec).iteration == 2
    other = tmp_path / "other"
    network(WIDE["gpt2"](), seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match="is not the model that `ckpt_path` was trained on: its frozen weights differ"):
        resumed(ModelSpec(other, adapter=LORA, quantization="nf4"))
    with pytest.raises(ValueError, match="`policy` is not the network that `ckpt_path` holds: `.*lora_A.*` is"):
        resumed(ModelSpec(wide_folders["gpt2"], adapter={**LORA, "r": 2}, quantization="nf4"))
    saved["state_dict"].pop("policy.value_head.out.bias")
    torch.save(saved, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match="it has `policy.value_head.out.bias`, and the checkpoint does not"):
        resumed(spec, tmp_path / "less.ckpt")
    with pytest.raises(RuntimeError, match=r"`state_dict` lacks \['policy.value_head.out.bias'\], and has \['more'\]"):
        module.load_state_dict({**saved["state_dict"], "more": torch.zeros(1)})


def test_a_checkpoint_holds_a_model_that_has_no_name(tmp_path):
    module = module_of(PPOModule, ModelSpec(tiny_gpt2(), adapter=LORA), kl_coef=0.1)
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=6))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == set(module.state_dict())


def test_a_frozen_quantised_policy_learns_values_and_a_quantised_reference_judges(wide_folders):
    spec = ModelSpec(wide_folders["llama"], quantization="nf4", num_layers_unfrozen=0)
    module = module_of(PPOModule, spec, kl_coef=0.1)
    fit(module, iterations=1)
    assert sum(p.requires_grad for p in module.parameters()) == 4
    reference = ModelSpec(wide_folders["llama"], quantization="int8")
    module = module_of(PPOModule, ModelSpec(wide_folders["llama"]), kl_coef=0.1, reference=reference)
    seen = fit(module, iterations=1)
    assert 0 < abs(seen.metrics[0]["kl/sequence"]) < 0.5  # rounding is a distance


def test_lightnings_quantisation_is_refused_by_name(wide_folders):
    trainer = bare_trainer(max_epochs=1)
    trainer.strategy.precision_plugin = BitsandbytesPrecision("nf4", dtype=torch.float32)  # which wants a GPU itself
    module = module_of(PPOModule, wide_folders["gpt2"])
    with pytest.raises(ValueError, match=r"`Trainer\(plugins=BitsandbytesPrecision\(...\)\)` would quantise every lin"):
        trainer.fit(module, datamodule=PromptDataModule(PROMPTS))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_layers_unfrozen": 1}, "`reference.num_layers_unfrozen=1` would be read by nothing"),
        ({"gradient_checkpointing": True}, "`reference.gradient_checkpointing=True` would be read by nothing"),
        ({"adapter": LORA}, "`reference.adapter=.* is not trained, so that it would add nothing: pass the folder"),
    ],
)
def test_a_reference_is_not_told_how_to_train(more, message, wide_folders):
    with pytest.raises(ValueError, match=message):
        module_of(PPOModule, wide_folders["gpt2"], kl_coef=0.1, reference={"model": str(wide_folders["gpt2"]), **more})


def test_there_is_nothing_to_merge_without_an_adapter(wide_folders, tmp_path):
    with pytest.raises(ValueError, match="`merge_adapter=True`: PPOModule has no adapter, so leave it out"):
        module_of(PPOModule, wide_folders["gpt2"]).save_pretrained(tmp_path, merge_adapter=True)


def longer_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def test_rows_of_new_tokens_are_alike_in_policy_and_reference_and_said_to_stay(wide_folders):
    spec = ModelSpec(wide_folders["llama"], adapter=LORA)
    module = module_of(PPOModule, spec, kl_coef=0.1, tokenizer=longer_tokenizer())
    with (
        pytest.warns(UserWarning, match="were resized"),
        pytest.warns(UserWarning, match="rows of 1 new tokens at the"),
    ):
        module.configure_model()
    full = module_of(
        PPOModule, wide_folders["llama"], kl_coef=0.1, tokenizer=longer_tokenizer(), reference=wide_folders["llama"]
    )
    with pytest.warns(UserWarning, match="were resized"):
        full.configure_model()
    assert fingerprint(full.reference.network.decoder) == fingerprint(full.policy.decoder)
    seen = fit(full, iterations=1)
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=2e-5)


def test_a_yaml_names_adapter_and_quantisation(wide_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the command line leaves its configuration where it stands
    run = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1},
        "model": {
            "class_path": "PPOModule",
            "init_args": {
                "policy": {
                    "model": str(wide_folders["gpt2"]),
                    "adapter": {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["c_attn"]}},
                    "quantization": "nf4",
                    "gradient_checkpointing": True,
                },
                "reward": "tests.training.share_of_early_letters",
                "sampling": {"max_new_tokens": 4},
                # bitsandbytes, which PEFT imports, has one of that name too.
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001}},
            },
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"prompts": PROMPTS}},
        "save_pretrained": str(tmp_path / "out"),
    }
    run["trainer"] |= {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "devices": 1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert '"r": 2' in (tmp_path / "out" / "adapter_config.json").read_text()
    del run["model"]["init_args"]["policy"]["adapter"]
    run["model"]["init_args"]["policy"] |= {"adapter": {"peft_type": "IA3"}, "quantization": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert "IA3" in (tmp_path / "out" / "adapter_config.json").read_text()
