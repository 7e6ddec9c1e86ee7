"""What `save_pretrained` writes: a folder that transformers reads alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf import PPOModule
from tests.networks import ARCHITECTURES, EOS, MORE, PAD, VOCABULARY, tiny_gpt2, word_tokenizer

TOKENS = torch.arange(12).reshape(2, 6)


def module_of(policy: Any, tokenizer: Any = None) -> PPOModule:
    module = PPOModule(policy, tokenizer=tokenizer or word_tokenizer(), reward=lambda prompts, responses: [0.0])
    module.configure_model()
    return module


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def same_model(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """The weights are equal, bit by bit; products may round otherwise where these lie otherwise in memory."""
    parameters = dict(other.named_parameters())
    assert all(torch.equal(parameter, parameters.pop(name)) for name, parameter in one.named_parameters())
    assert not parameters
    assert_close(logits(one), logits(other), rtol=0, atol=1e-6)


def stored(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@pytest.mark.invariant(18)
@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neox", "opt", "bloom", "llama", "gemma", *MORE, "rwkv"])
@pytest.mark.filterwarnings("ignore:RwkvForCausalLM cannot")
def test_the_folder_loads_alone_with_the_same_logits(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = module_of(ARCHITECTURES[name]())
    with torch.no_grad():
        for parameter in module.policy.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    module.save_pretrained(tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is type(module.policy.decoder.model)
    module.policy.eval()
    saved = dict(module.policy.decoder.model.named_parameters())
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    # To rounding: it has the activations as transformers writes them out.
    assert_close(logits(model), logits(module.policy.decoder.model), rtol=0, atol=1e-5)
    assert float(logits(model).std()) > 0.01

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a b d")["input_ids"] == [0, 1, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    assert tokenizer.get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.invariant(18)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_what_is_tied_stays_tied_and_is_written_once(is_tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = module_of(tiny_gpt2(tie_word_embeddings=is_tied))
    module.save_pretrained(tmp_path)
    heads = [name for name in stored(tmp_path) if name in ("transformer.wte.weight", "lm_head.weight")]
    assert len(heads) == (1 if is_tied else 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is is_tied


@pytest.mark.invariant(18)
def test_the_value_head_stays_behind(tmp_path: Path) -> None:
    module = module_of(tiny_gpt2())
    assert module.policy.value_head is not None
    module.save_pretrained(tmp_path)
    plain = {name for name, _ in module.policy.decoder.model.named_parameters()}
    assert set(stored(tmp_path)) == plain


@pytest.mark.invariant(18)
def test_the_original_dropout_is_in_the_folder_and_not_in_the_module(tmp_path: Path) -> None:
    from transformers import AutoConfig

    module = module_of(tiny_gpt2(attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.3))
    model = module.policy.decoder.model
    module.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.1, 0.2, 0.3)
    assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.embd_pdrop) == (0.0, 0.0, 0.0)
    assert {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}
    module.train()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.invariant(18)
@pytest.mark.filterwarnings("ignore:The tokenizer has 26 tokens and the model 24 rows")
def test_added_tokens_are_in_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    module = module_of(tiny_gpt2(), tokenizer)
    module.policy.eval()
    module.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    same_model(model, module.policy.decoder.model)
    assert AutoTokenizer.from_pretrained(tmp_path)("a <think> b")["input_ids"] == [0, 24, 1]


@pytest.mark.invariant(18)
def test_a_folder_that_was_saved_starts_the_next_run(tmp_path: Path) -> None:
    first = module_of(tiny_gpt2())
    first.save_pretrained(tmp_path / "first")
    second = PPOModule(str(tmp_path / "first"), reward=lambda prompts, responses: [0.0], seed=5)
    second.configure_model()
    same_model(second.policy.decoder.model.eval(), first.policy.decoder.model.eval())
    second.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "config.json").read_text() == (tmp_path / "first" / "config.json").read_text()


def test_saving_again_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "deep" / "out"
    module = module_of(tiny_gpt2())
    module.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    with torch.no_grad():
        module.policy.decoder.model.get_input_embeddings().weight.add_(1.0)
    module.save_pretrained(folder)
    module.policy.eval()
    same_model(AutoModelForCausalLM.from_pretrained(folder), module.policy.decoder.model)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
