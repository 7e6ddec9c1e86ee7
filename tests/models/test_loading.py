"""From what a user names to a network and its tokenizer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_rlhf import PPOModule
from lightning_rlhf.models.loading import ModelSpec, load_tokenizer
from lightning_rlhf.models.reference import fingerprint
from lightning_rlhf.models.vocabulary import SpecialTokens, fit_embeddings
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, EOS, PAD, VOCABULARY, network, tiny_gpt2, word_tokenizer

TOKENS = torch.arange(12).reshape(2, 6)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return fingerprint(one) == fingerprint(other)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and its tokenizer, as transformers writes them."""
    network(tiny_gpt2()).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- what a model may be given as -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [str, Path, ModelSpec, lambda folder: {"model": str(folder)}])
def test_a_folder_is_read_however_it_is_given(folder: Path, given: Callable[[Path], Any]) -> None:
    spec = ModelSpec.of(given(folder))
    assert spec.is_named
    assert same_weights(spec.load(), network(tiny_gpt2()))


def test_a_folder_beside_which_we_stand_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert same_weights(ModelSpec("model").load(), network(tiny_gpt2()))
    assert same_weights(ModelSpec("./model").load(), network(tiny_gpt2()))


def test_a_spec_is_taken_as_it_is_and_from_its_fields() -> None:
    spec = ModelSpec("gpt2", dtype="bfloat16")
    assert ModelSpec.of(spec) is spec
    assert ModelSpec.of({"model": "gpt2", "dtype": "bfloat16"}) == spec
    assert ModelSpec.of("gpt2") == ModelSpec("gpt2")
    assert spec.plain() == {
        "model": "gpt2",
        "dtype": "bfloat16",
        "attn_implementation": None,
        "revision": None,
        "trust_remote_code": False,
        "num_layers_unfrozen": -1,
        "adapter": None,
        "quantization": None,
        "gguf_file": None,
        "gradient_checkpointing": False,
    }
    with pytest.raises(TypeError, match="weight_dtype"):
        ModelSpec.of({"model": "gpt2", "weight_dtype": "bfloat16"})


def test_a_config_is_given_random_weights_and_stays_as_it_is() -> None:
    config = tiny_gpt2()
    before = config.to_dict()
    spec = ModelSpec(config)
    assert not spec.is_named
    assert spec.plain() is None
    torch.manual_seed(1)
    first = spec.load()
    torch.manual_seed(1)
    second = spec.load()
    assert same_weights(first, second)
    assert not same_weights(first, spec.load())
    assert not first.training
    first.config.vocab_size = 3
    assert config.to_dict() == before


def test_an_object_is_copied_and_never_trained() -> None:
    model = network(tiny_gpt2(attn_pdrop=0.3))
    before = fingerprint(model)
    module = PPOModule(model, tokenizer=word_tokenizer(), reward=lambda prompts, responses: [0.0])
    module.configure_model()
    copied = module.policy.decoder.model
    assert same_weights(copied, model)
    assert_close(logits(copied.eval()), logits(model), rtol=0, atol=1e-5)  # activations of one operator
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(1.0)
    assert fingerprint(model) == before
    assert model.config.attn_pdrop == 0.3
    assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight


@pytest.mark.parametrize("kind", ["config", "object", "folder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "torch.float16"])
def test_weights_have_the_dtype_that_was_asked_for(kind: str, dtype: str, folder: Path) -> None:
    model = {"config": tiny_gpt2(), "object": network(tiny_gpt2()), "folder": folder}[kind]
    wanted = getattr(torch, dtype.removeprefix("torch."))
    assert {parameter.dtype for parameter in ModelSpec(model, dtype=dtype).load().parameters()} == {wanted}


def test_weights_are_single_precision_by_default_whatever_they_were_saved_in(tmp_path: Path) -> None:
    model = network(tiny_gpt2()).bfloat16()
    model.save_pretrained(tmp_path)
    for source in (str(tmp_path), model, model.config):
        assert {parameter.dtype for parameter in ModelSpec(source).load().parameters()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_the_attention_is_the_one_that_was_asked_for(folder: Path) -> None:
    for source in (tiny_gpt2(), folder):
        for name in ("eager", "sdpa"):
            assert ModelSpec(source, attn_implementation=name).load().config._attn_implementation == name


# --- what it may not be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "single", "nn"])
def test_a_dtype_that_is_none_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"`dtype='{dtype}'` must be a floating-point type such as 'float32'"):
        ModelSpec(tiny_gpt2(), dtype=dtype).load()


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/model", "runs/7/model", "../model"])
def test_a_missing_folder_is_named(name: str) -> None:
    message = f"`model='{name}'` looks like a folder, and there is none: check the path"
    with pytest.raises(ValueError, match=message):
        ModelSpec(name).load()
    with pytest.raises(ValueError, match=message):
        ModelSpec(name).load_tokenizer()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("kind", ["config", "object", "folder"])
def test_an_encoder_decoder_is_loaded_whole_and_not_cut_in_half(name: str, kind: str, tmp_path: Path) -> None:
    model: Any = network(ENCODER_DECODERS[name]())
    model.generation_config.forced_bos_token_id = 5
    names = set(model.state_dict())
    if kind == "config":
        model = model.config
    if kind == "folder":
        model.save_pretrained(tmp_path)
        model = tmp_path
    loaded = ModelSpec(model).load()
    assert type(loaded).__name__ == {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[name]
    assert set(loaded.state_dict()) == names
    assert loaded.generation_config.forced_bos_token_id == (None if kind == "config" else 5)


@pytest.mark.invariant(3)
@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_a_longer_tokenizer_resizes_both_halves_of_an_encoder_decoder(name: str) -> None:
    model = network(ENCODER_DECODERS[name]())
    before = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    with pytest.warns(UserWarning, match="The tokenizer has 27 tokens and the model 24 rows"):
        fit_embeddings(model, longer_tokenizer())
    after = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    assert_close(after[..., :VOCABULARY], before, rtol=1e-6, atol=1e-5)
    new = torch.tensor([[VOCABULARY, VOCABULARY + 2]])
    assert bool(model(input_ids=new, decoder_input_ids=new).logits.isfinite().all())


def test_a_model_without_a_language_modelling_head_is_refused() -> None:
    from transformers import GPT2ForSequenceClassification, GPT2Model

    for kind in (GPT2Model, GPT2ForSequenceClassification):
        with pytest.raises(ValueError, match=f"`model={kind.__name__}` has no language-modelling head: load it as"):
            ModelSpec(kind(tiny_gpt2())).load()


@pytest.mark.parametrize("model", [3, None, nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="must be a hub name, a folder, a transformers config or a PreTrainedModel"):
        ModelSpec(model).load()


# --- built under a seed ---------------------------------------------------------------------------------------------


def built(seed: int | None) -> PPOModule:
    module = PPOModule(tiny_gpt2(), tokenizer=word_tokenizer(), reward=lambda prompts, responses: [0.0], seed=seed)
    module.configure_model()
    return module


def test_a_config_is_built_the_same_under_the_same_seed_whatever_was_drawn_before() -> None:
    first = built(seed=7)
    torch.manual_seed(123)
    torch.rand(5)
    state = torch.get_rng_state()
    second = built(seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first.policy, second.policy)  # its value head too
    other = built(seed=8)
    assert not same_weights(first.policy.decoder, other.policy.decoder)
    assert not same_weights(first.policy.value_head, other.policy.value_head)


def test_networks_are_built_once() -> None:
    module = built(seed=7)
    policy = module.policy
    module.configure_model()
    assert module.policy is policy


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_one_beside_the_weights_or_the_one_that_was_given(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(None, ModelSpec(folder)).get_vocab() == word_tokenizer().get_vocab()
    given = word_tokenizer(5)
    assert load_tokenizer(given, ModelSpec(folder)) is given
    given.save_pretrained(tmp_path / "other")
    for name in (tmp_path / "other", str(tmp_path / "other")):
        assert load_tokenizer(name, ModelSpec(tiny_gpt2())).get_vocab() == given.get_vocab()


@pytest.mark.parametrize("kind", ["config", "object"])
def test_a_config_or_an_object_needs_a_tokenizer(kind: str) -> None:
    model = tiny_gpt2() if kind == "config" else network(tiny_gpt2())
    with pytest.raises(ValueError, match="`tokenizer=None` must be given where the model is a config or an object"):
        load_tokenizer(None, ModelSpec(model))


def headed(eos: int | list[int] | None) -> Any:
    model = network(tiny_gpt2())
    model.generation_config.eos_token_id = eos
    return model


def test_the_tokens_that_end_and_fill_are_the_tokenizers() -> None:
    assert SpecialTokens.of(word_tokenizer(), headed(None)) == SpecialTokens((EOS,), PAD)
    assert SpecialTokens.of(word_tokenizer(), headed(EOS)) == SpecialTokens((EOS,), PAD)


def test_the_generation_config_may_name_more_tokens_that_end_a_text() -> None:
    assert SpecialTokens.of(word_tokenizer(), headed(3)).eos == (EOS, 3)
    assert SpecialTokens.of(word_tokenizer(), headed([3, EOS, 5, 3])).eos == (EOS, 3, 5)
    assert SpecialTokens.of(word_tokenizer(eos=False), headed([3, 5])).eos == (3, 5)


def test_a_token_for_which_the_model_has_no_row_ends_nothing() -> None:
    assert SpecialTokens.of(word_tokenizer(), headed([50256, -1])).eos == (EOS,)


def test_without_a_token_that_ends_a_text_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`tokenizer` has no EOS token.*set `tokenizer.eos_token`"):
        SpecialTokens.of(word_tokenizer(eos=False), headed(None))
    with pytest.raises(ValueError, match="has no EOS token"):
        SpecialTokens.of(word_tokenizer(eos=False), headed([50256]))


@pytest.mark.invariant(3)
def test_without_a_pad_token_eos_fills_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        special = SpecialTokens.of(word_tokenizer(VOCABULARY - 1, pad=False), headed(None))
    assert special == SpecialTokens((EOS,), EOS)
    assert "no PAD token: rows are filled with EOS" in caplog.text


# --- embeddings -----------------------------------------------------------------------------------------------------


def longer_tokenizer(more: int = 3) -> Any:
    tokenizer = word_tokenizer()
    assert tokenizer.add_tokens([f"<new{i}>" for i in range(more)]) == more
    return tokenizer


@pytest.mark.parametrize("name", ["gpt2", "gptj", "opt", "llama", "gemma", "phi", "gpt_neox"])
def test_a_tokenizer_with_more_tokens_resizes_the_embeddings_and_says_so(name: str) -> None:
    model = network(ARCHITECTURES[name]())
    embedding, head = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    bias = None if bias is None else bias.clone()
    before = logits(model)
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with pytest.warns(UserWarning, match="The tokenizer has 27 tokens and the model 24 rows: .* were resized"):
        fit_embeddings(model, longer_tokenizer())

    for new, old in ((model.get_input_embeddings().weight, embedding), (model.get_output_embeddings().weight, head)):
        assert new.shape == (VOCABULARY + 3, old.shape[1])
        assert torch.equal(new[:VOCABULARY], old)
        assert_close(new[VOCABULARY:].double(), old.double().mean(0).expand(3, -1), rtol=1e-5, atol=1e-7)
    if bias is not None:
        assert_close(model.get_output_embeddings().bias[VOCABULARY:], bias.mean().expand(3), rtol=1e-5, atol=1e-7)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is is_tied
    assert model.config.vocab_size == VOCABULARY + 3
    assert_close(logits(model)[..., :VOCABULARY], before, rtol=1e-6, atol=1e-5)
    assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize("tokens", [VOCABULARY, VOCABULARY - 5])
def test_a_model_with_rows_to_spare_is_left_alone(tokens: int) -> None:
    model = network(tiny_gpt2())
    before = fingerprint(model)
    fit_embeddings(model, word_tokenizer(tokens))
    assert fingerprint(model) == before


def test_resized_embeddings_can_be_trained() -> None:
    model = network(tiny_gpt2())
    with pytest.warns(UserWarning, match="were resized"):
        fit_embeddings(model, longer_tokenizer())
    model(input_ids=torch.tensor([[VOCABULARY + 1, 2]])).logits[..., VOCABULARY].sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert float(gradient[VOCABULARY].abs().sum()) > 0
    assert float(gradient[VOCABULARY + 1].abs().sum()) > 0
