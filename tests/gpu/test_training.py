"""A run on a GPU: in single precision the same numbers as on a CPU, in half precision close to them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.testing import assert_close

from lightning_rlhf import (
    ConversationDataModule,
    GRPOModule,
    ModelSpec,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, network, tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, bare_trainer, fit, module_of, sgd

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LONG = {"max_new_tokens": 20}
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


def model(name: str) -> Any:
    return network({**ARCHITECTURES, **ENCODER_DECODERS}[name](), spread=1.0)


def llama(**more: Any) -> ModelSpec:
    return ModelSpec(model("llama"), **more)


RUNS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    **{f"ppo-{name}": (PPOModule, functools.partial(model, name), {}) for name in ("gpt2", "gptj", "gpt_neox", "opt")},
    **{f"ppo-{name}": (PPOModule, functools.partial(model, name), {}) for name in ("llama", "qwen3", "gemma", "bloom")},
    **{f"ppo-{name}": (PPOModule, functools.partial(model, name), {}) for name in ("mistral", "t5", "bart")},
    "ppo-hydra": (PPOModule, functools.partial(llama, num_layers_unfrozen=1), {}),
    "ppo-lora": (PPOModule, functools.partial(llama, adapter=LORA), {}),
    # An adapter that adds nothing at first: a random one is another one where it is drawn in half precision.
    "ppo-lora-zero": (PPOModule, functools.partial(llama, adapter={**LORA, "init_lora_weights": True}), {}),
    "ppo-critic": (PPOModule, llama, {"critic": "policy"}),
    "ppo-branch": (PPOModule, llama, {"num_value_layers_unfrozen": 1}),
    "ppo-offload": (PPOModule, llama, {"offload_frozen": True}),
    "ppo-background": (PPOModule, llama, {"reward_in_background": True}),
    "ppo-recomputes": (PPOModule, llama, {"recompute_logprobs": True, "importance_cap": 2.0}),
    "ppo-whitens": (PPOModule, llama, {"reward_scaling": "running"}),
    "grpo": (GRPOModule, llama, {"group_size": 2}),
    "grpo-kl": (GRPOModule, llama, {"group_size": 2, "kl_coef": 0.1, "micro_batch_size": 2}),
}


def run(name: str, accelerator: str, **flags: Any) -> tuple[Any, Any]:
    cls, policy, arguments = RUNS[name]
    module = module_of(cls, policy(), sampling=LONG, **arguments)
    seen = fit(module, iterations=2, accelerator=accelerator, **flags)
    return module, seen


def parameters(module: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().float().flatten() for parameter in module.parameters()])


@pytest.mark.filterwarnings("ignore:BloomForCausalLM cannot be decoded by recorded steps")
@pytest.mark.parametrize("name", RUNS)
def test_in_single_precision_a_gpu_learns_what_a_cpu_learns(name: str) -> None:
    (module, seen), (expected, seen_on_cpu) = run(name, "gpu"), run(name, "cpu")
    for mine, theirs in zip(seen.experiences, seen_on_cpu.experiences, strict=True):
        assert torch.equal(mine.response_tokens.cpu(), theirs.response_tokens)
        assert_close(mine.old_logprobs.cpu(), theirs.old_logprobs, **CLOSE)
    assert_close(parameters(module), parameters(expected), **CLOSE)
    for name, value in seen_on_cpu.metrics[-1].items():
        if not name.startswith(("time/", "speed/")):
            assert seen.metrics[-1][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("name", ["ppo-gpt2", "ppo-llama", "ppo-qwen3", "ppo-t5", "ppo-hydra", "ppo-lora-zero", "grpo"])
def test_half_precision_learns_about_the_same(name: str, precision: str) -> None:
    module, seen = run(name, "gpu", precision=precision)
    cls, policy, arguments = RUNS[name]
    exact = module_of(cls, policy(), sampling=LONG, **arguments)  # as it began, in single precision
    exact.configure_model()
    exact.policy.cuda().eval()
    first = seen.experiences[0]
    with torch.no_grad():
        expected = exact.policy(replace(first, trunk=None), with_values=False).logprobs
    error = (first.old_logprobs - expected)[first.response_mask].abs()
    assert error.mean() < 0.05, "what the sampler says of its tokens is what they were, but for rounding"
    moved = parameters(module) - parameters(exact)
    assert moved.isfinite().all()
    assert moved.abs().max() > 0
    assert seen.metrics[-1]["optim/grad_norm"] < 100


def test_one_process_under_fsdp2_learns_the_same() -> None:
    (module, _), (expected, _) = run("ppo-llama", "gpu", strategy="rlhf_fsdp2"), run("ppo-llama", "gpu")
    whole = torch.cat([parameter.full_tensor().detach().cpu().flatten() for parameter in module.parameters()])
    assert_close(whole, parameters(expected), **CLOSE)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # Lightning wraps in a stream of its own
def test_one_process_under_ddp_learns_the_same() -> None:
    (module, _), (expected, _) = run("ppo-llama", "gpu", strategy="ddp"), run("ppo-llama", "gpu")
    assert_close(parameters(module), parameters(expected), **CLOSE)


@pytest.mark.filterwarnings("default")  # tracing warns of what is torch's own
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_blocks_learn_the_same(precision: str) -> None:
    found = module_of(PPOModule, llama(), sampling=LONG, compile=True)
    fit(found, iterations=2, accelerator="gpu", precision=precision)
    expected, _ = run("ppo-llama", "gpu", precision=precision)
    tolerance = CLOSE if precision == "32-true" else {"rtol": 0.0, "atol": 0.1}
    assert_close(parameters(found), parameters(expected), **tolerance)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_comes_to_the_same_numbers(tmp_path) -> None:
    def begun() -> Any:
        return module_of(PPOModule, llama(), sampling=LONG)

    whole, first, second = begun(), begun(), begun()
    fit(whole, iterations=4, accelerator="gpu")
    saved = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(first, iterations=2, accelerator="gpu", enable_checkpointing=True, callbacks=[saved])
    trainer = bare_trainer(max_epochs=4, accelerator="gpu")
    trainer.fit(second, datamodule=PromptDataModule(PROMPTS, batch_size=len(PROMPTS)), ckpt_path=saved.last_model_path)
    assert_close(parameters(second), parameters(whole), rtol=0.0, atol=1e-6)


CONVERSATIONS = [{"prompt": "a b", "response": "c d e"}, {"prompt": "a", "response": "c d e f g"}] * 4
PAIRS = [{"prompt": "a b", "chosen": "c d e", "rejected": "f"}, {"prompt": "c", "chosen": "a", "rejected": "f g"}] * 2


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 2e-2), ("16-mixed", 2e-2)])
@pytest.mark.parametrize(
    "kind", ["sft", "sft_packed", "sft_checkpointed", "sft_bart_checkpointed", "reward", "reward_encoder"]
)
def test_offline_stages_learn_what_they_learn_on_a_cpu(kind: str, precision: str, tolerance: float) -> None:
    def trained(accelerator: str, precision: str) -> torch.Tensor:
        torch.manual_seed(0)
        data: Any
        shared = {"tokenizer": word_tokenizer(), "optimizer": sgd}
        if kind.startswith("sft"):
            name = "bart" if "bart" in kind else "llama"
            spec = ModelSpec(model(name), gradient_checkpointing=kind.endswith("checkpointed"))
            module: Any = SFTModule(spec, **shared)
            size = {"batch_tokens": 64} if kind == "sft_packed" else {"batch_size": 4}
            data = ConversationDataModule(CONVERSATIONS, shuffle=False, **size)
        else:
            from tests.networks import ENCODERS

            config = ENCODERS["bert"]() if kind == "reward_encoder" else tiny_gpt2(attn_pdrop=0.0)
            from transformers import AutoModelForSequenceClassification

            config.num_labels = 1
            module = RewardModule(AutoModelForSequenceClassification.from_config(config), **shared)
            data = PreferenceDataModule(PAIRS, batch_size=4, shuffle=False)
        how: dict[str, Any] = {"precision": precision}
        if precision == "16-mixed":  # with a scale at which no step overflows and is left out
            scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
            how = {"plugins": MixedPrecision("16-mixed", "cuda", scaler)}
        bare_trainer(max_epochs=2, accelerator=accelerator, **how).fit(module, datamodule=data)
        return parameters(module)

    assert_close(trained("gpu", precision), trained("cpu", "32-true"), rtol=0.0, atol=tolerance)


QUANTISED = {"adapter": {**LORA, "r": 4}, "quantization": "nf4"}


@pytest.mark.parametrize("kind", ["adamw8bit", "nf4", "int8"])
def test_bitsandbytes_trains(kind: str, wide_folders: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="its wheel is not there")
    arguments: dict[str, Any] = {}
    if kind == "adamw8bit":
        arguments["optimizer"] = functools.partial(bnb.optim.AdamW8bit, lr=1e-3, min_8bit_size=16)
        policy: Any = llama()
    else:
        policy = ModelSpec(wide_folders["llama"], **{**QUANTISED, "quantization": kind})
    module = module_of(PPOModule, policy, sampling=LONG, **arguments)
    seen = fit(module, iterations=2, accelerator="gpu", precision="bf16-mixed")
    assert parameters(module).isfinite().all()
    assert seen.metrics[-1]["optim/grad_norm"] > 0
    # What learns from its own words says them again, but for rounding.
    assert seen.metrics[0].get("policy/sampler_gap", 0.0) < 0.2
    if kind == "adamw8bit":
        states = module.trainer.optimizers[0].state.values()
        assert any(state["state1"].dtype == torch.uint8 for state in states)
    else:
        held = {p.dtype for p in module.policy.decoder.model.parameters() if not p.is_floating_point()}
        assert held <= {torch.uint8, torch.int8}
        assert held, "weights are held in fewer bits"


def test_noise_goes_where_rows_in_line_are() -> None:
    module = SFTModule(llama(), tokenizer=word_tokenizer(), optimizer=sgd, neftune_alpha=5.0)
    data = ConversationDataModule(CONVERSATIONS, batch_size=4)
    bare_trainer(max_epochs=1, accelerator="gpu", precision="bf16-mixed").fit(module, datamodule=data)
    assert parameters(module).isfinite().all()
