"""Frozen weights in eight and four bits."""

import copy
import logging

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from lightning_rlhf import ModelSpec
from lightning_rlhf.models.adapter_reference import AdapterReference
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.export import plain_model
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.hydra import reference_of
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.quantization import (
    NAMES,
    dequantized,
    is_quantized,
    plain_quantization,
    quantization_config,
    steady,
)
from lightning_rlhf.models.reference import fingerprint
from lightning_rlhf.models.scorer_loading import load_scorer
from lightning_rlhf.modules.saving import merged
from tests.models.test_reference import BY_LENGTH, rollouts, scored, train
from tests.networks import ARCHITECTURES, network, tiny_gpt2

WIDE = {
    "gpt2": lambda: tiny_gpt2(width=64, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0),
    "llama": lambda: ARCHITECTURES["llama"](hidden_size=64, intermediate_size=128),
}  # weights are rounded in groups of 64
TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module", params=WIDE)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    network(WIDE[request.param]()).save_pretrained(path)
    return path


def policy_of(folder, quantization, adapter=None):
    spec = ModelSpec(folder, quantization=quantization, adapter=adapter)
    decoder = Decoder(spec.load())
    decoder.adapters = spec.adapt(decoder.model)
    probe(decoder)
    return Policy(decoder, value_head=ValueHead(decoder.width)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def error_of(weight, levels):
    """The root mean square of what rounding to equal steps over each row's range would cost."""
    return float((weight.abs().amax(1) / levels / 12**0.5).square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_rounded_to_so_many_bits_and_the_head_and_norms_are_not(folder, name):
    model, whole = ModelSpec(folder, quantization=name).load(), ModelSpec(folder).load()
    assert is_quantized(model)
    assert not is_quantized(whole)
    kind, levels = (Linear8bitLt, 127) if name == "int8" else (Linear4bit, 7)
    layers = [module for module in model.modules() if isinstance(module, kind)]
    assert len(layers) == {"gpt2": 8, "llama": 14}[whole.config.model_type]
    for path, module in model.named_modules():
        weight = dequantized(module)
        if weight is not None:
            original = whole.get_submodule(path).weight.detach()
            original = original.t() if whole.config.model_type == "gpt2" else original
            error = float((weight - original).square().mean().sqrt())
            assert 0.3 * error_of(original, levels) < error < 1.5 * error_of(original, levels), path
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert type(embedding.weight) is torch.nn.Parameter
        assert embedding.weight.dtype == torch.float32


@pytest.mark.invariant(9)
@pytest.mark.parametrize("name", ["int8", "nf4", "nf4-dq"])
def test_a_quantised_layer_computes_the_same_in_evaluation_and_training_and_stays_what_it_is(folder, name):
    model = ModelSpec(folder, quantization=name).load()
    weights = fingerprint(copy.deepcopy(model))
    written = logits(model.eval())
    assert torch.equal(logits(model.train()), written)
    assert torch.equal(logits(model.eval()), written)
    assert_close(logits(plain_model(model, model.state_dict())), written, rtol=0, atol=1e-4)
    assert fingerprint(model) == weights
    first = TOKENS[:, :3]
    with torch.no_grad():
        assert_close(model(input_ids=first).logits, written[:, :3], rtol=0, atol=1e-4)  # what follows is not looked at


def test_bitsandbytes_alone_would_not_do_so():
    """If this fails, :func:`steady` is no longer needed for eight bits."""
    torch.manual_seed(0)
    layer = Linear8bitLt(64, 64, has_fp16_weights=False)
    layer = layer.to("cpu")
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert float((layer.eval()(x) - layer.train()(x)).abs().max()) > 1e-4
        steady(layer)
        assert torch.equal(layer.eval()(x), layer.train()(x))
        assert isinstance(layer, Linear8bitLt)


@pytest.mark.invariant(10, 11, 13)
@pytest.mark.parametrize("name", ["int8", "nf4", "nf4-dq"])
def test_an_adapter_learns_on_a_quantised_model_and_is_merged_into_what_that_is(folder, name, tmp_path, caplog):
    policy = policy_of(folder, name, LoraConfig(r=4))
    reference = reference_of(policy, is_named=True)
    assert isinstance(reference, AdapterReference)
    expected = scored(policy_of(folder, name), BY_LENGTH, 2)
    assert torch.equal(reference.logprobs(rollouts(), 2), expected)
    assert torch.equal(scored(policy, BY_LENGTH, 2), expected)
    before = {n: p.clone() for n, p in policy.decoder.named_parameters()}
    train(policy)
    changed = {n for n, p in policy.decoder.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in policy.decoder.named_parameters() if p.requires_grad}
    assert changed == {n for n in before if ".lora_" in n}
    assert torch.equal(reference.logprobs(rollouts(), 2), expected)

    with caplog.at_level(logging.INFO):
        merged(policy.decoder).save_pretrained(tmp_path / "merged")
    assert "The merged model's logits differ from those of the quantised one by" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not is_quantized(again)
    # What it must be: the adapter, unmerged, on the weights that the rounded ones stand for.
    plain = plain_model(policy.decoder.model, policy.decoder.model.state_dict())
    adapters = ModelSpec(plain, adapter=LoraConfig(r=4)).adapt(plain)
    adapters._load(adapters.peft, policy.decoder.adapters.state(), "default")
    assert_close(logits(again), logits(plain), rtol=1e-5, atol=2e-5)
    assert_close(logits(again), logits(policy.decoder.model), rtol=0, atol=1e-4)
    far = logits(ModelSpec(folder).load())
    assert float((logits(again) - far).abs().max()) > 1e-3


def test_a_quantisation_is_given_by_name_or_field_or_object():
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_threshold=0.0,
    )
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    plain = plain_quantization(wanted)
    assert plain["bnb_4bit_compute_dtype"] == "bfloat16"
    for given in ("nf4-dq", fields, wanted, plain):
        assert quantization_config(given, torch.bfloat16).to_dict() == wanted.to_dict()
    assert plain_quantization("nf4") == "nf4"
    assert plain_quantization(None) is None


def test_what_rounds_one_row_by_the_others_is_refused():
    for given in (BitsAndBytesConfig(load_in_8bit=True), {"load_in_8bit": True, "llm_int8_threshold": 6.0}):
        with pytest.raises(ValueError, match=r"with `llm_int8_threshold=6.0` the columns .* set it to 0.0, as `quant"):
            quantization_config(given, torch.float32)


def test_what_is_no_quantisation_is_refused():
    with pytest.raises(
        ValueError, match="`quantization='4bit'` must be one of 'int8', 'nf4', 'nf4-dq', 'fp4', 'fp4-dq'"
    ):
        quantization_config("4bit", torch.float32)
    with pytest.raises(
        TypeError, match=r"`quantization=4` must be a name \('int8', .*`BitsAndBytesConfig` or its fields"
    ):
        quantization_config(4, torch.float32)


@pytest.mark.parametrize("name", ["quantization", "gguf_file"])
def test_what_is_in_memory_already_is_not_read_in_another_way(name):
    for model in (tiny_gpt2(), network(tiny_gpt2())):
        with pytest.raises(ValueError, match=f"`{name}='nf4'` is a way of reading weights, .* by `save_pretrained`"):
            ModelSpec(model, **{name: "nf4"})


@pytest.mark.parametrize("kind", [{"load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_threshold": 0.0}])
def test_a_quantised_object_is_refused_by_name(kind, folder):
    options = {"quantization_config": BitsAndBytesConfig(**kind, llm_int8_skip_modules=["score"])}
    complaint = r"`model={}.*` is quantised, and cannot be copied as torch.float32: pass the folder .*quantization="
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match=complaint.format(type(model).__name__)):
        ModelSpec(model, adapter={"peft_type": "LORA"}).load()
    scorer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **options)
    with pytest.raises(ValueError, match=complaint.format(type(scorer).__name__)):
        load_scorer(ModelSpec(scorer, adapter={"peft_type": "LORA"}))


def test_a_gguf_file_is_not_quantised_again():
    with pytest.raises(ValueError, match="`quantization='nf4'` does not go with `gguf_file='x.gguf'`, whose weights"):
        ModelSpec("here", quantization="nf4", gguf_file="x.gguf")
