"""One way to call any decoder: what it tells a model, what it hears back, and what trying it out finds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.data.tokens import padded
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.reading import positions_of
from tests.networks import ARCHITECTURES, MORE, PAD, USUAL, network, random_rows, tiny_gpt2

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROWS = random_rows([4, 9, 1], seed=1)


def heard(model: Any, decoder: Decoder, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a model's forward is called with."""
    calls: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    decoder(*args, **kwargs)
    handle.remove()
    assert len(calls) == 1
    return calls[0]


@pytest.mark.invariant(2)
def test_positions_count_real_tokens_only() -> None:
    model = network(tiny_gpt2())
    decoder = Decoder(model)
    tokens, mask = padded(ROWS, PAD, "left")
    arguments = heard(model, decoder, tokens, mask, keep=1)
    assert arguments["position_ids"].tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert arguments["attention_mask"].tolist() == mask.long().tolist()


@pytest.mark.invariant(2)
def test_padding_has_the_position_of_the_token_before_it() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 0]]).bool()
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.invariant(2)
def test_positions_go_on_where_the_cache_ended() -> None:
    model = network(tiny_gpt2())
    decoder = Decoder(model)
    tokens, mask = padded(ROWS, PAD, "left")
    cache = decoder(tokens, mask, keep=1, use_cache=True).cache
    longer = torch.cat([mask, mask.new_ones(3, 2)], dim=1)
    arguments = heard(model, decoder, tokens[:, :2], longer, keep=1, cache=cache, use_cache=True)
    assert arguments["position_ids"].tolist() == [[4, 5], [9, 10], [1, 2]]


@pytest.mark.invariant(2, 14)
@pytest.mark.parametrize("name", [*USUAL, *MORE, "openai_gpt", "mamba"])
def test_the_last_logits_under_left_padding_are_those_of_the_unpadded_text(name: str) -> None:
    model = network(ARCHITECTURES[name]())
    tokens, mask = padded(ROWS, PAD, "left")
    with torch.no_grad():
        logits = Decoder(model)(tokens, mask, keep=3).logits
        for i, row in enumerate(ROWS):
            alone = model(input_ids=torch.tensor([row])).logits[0, -3:]
            assert_close(logits[i, 3 - len(alone) :], alone, **CLOSE)


@pytest.mark.invariant(14)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_are_what_the_head_reads(name: str) -> None:
    model = network(ARCHITECTURES[name]())
    decoder = Decoder(model)
    tokens = torch.tensor(random_rows([7, 7], seed=2))
    with torch.no_grad():
        output = decoder(tokens, torch.ones_like(tokens, dtype=torch.bool), keep=4)
        logits = model.get_output_embeddings()(output.states)
        cap = getattr(model.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
    assert output.states.shape == (2, 4, decoder.width)
    assert_close(output.logits, logits, **CLOSE)
    assert_close(output.logits, model(input_ids=tokens).logits[:, -4:], **CLOSE)
    assert output.cache is None


def test_a_model_that_gives_all_logits_is_cut_to_those_that_were_asked_for() -> None:
    decoder = Decoder(network(tiny_gpt2()))
    tokens, mask = padded(ROWS, PAD, "left")
    expected = decoder(tokens, mask, keep=3)
    decoder.accepted -= {"logits_to_keep"}
    assert_close(decoder(tokens, mask, keep=3).logits, expected.logits, **CLOSE)
    assert_close(decoder(tokens, mask, keep=3).states, expected.states, **CLOSE)


@pytest.mark.parametrize("name", [*USUAL, *MORE])
@pytest.mark.filterwarnings("error")
def test_what_can_be_padded_and_cached_is_found_out_without_a_word(name: str) -> None:
    decoder = Decoder(network(ARCHITECTURES[name]()))
    probe(decoder)
    assert (decoder.pads, decoder.caches) == (True, True)


@pytest.mark.invariant(14)
@pytest.mark.parametrize("name", ["openai_gpt", "mamba"])
def test_a_model_without_a_cache_that_we_can_use_is_found_out_and_warned_of(name: str) -> None:
    decoder = Decoder(network(ARCHITECTURES[name]()))
    with pytest.warns(UserWarning, match="cannot be decoded from a cache: every token reads the whole text"):
        probe(decoder)
    assert (decoder.pads, decoder.caches) == (True, False)


@pytest.mark.invariant(14)
@pytest.mark.filterwarnings("ignore:RwkvForCausalLM cannot be decoded")
def test_a_model_that_padding_changes_is_found_out_and_warned_of() -> None:
    decoder = Decoder(network(ARCHITECTURES["rwkv"]()))
    with pytest.warns(UserWarning, match="RwkvForCausalLM cannot be padded on the left: .* equally long"):
        probe(decoder)
    assert (decoder.pads, decoder.caches) == (False, False)


@pytest.mark.invariant(14)
def test_a_cache_that_gives_other_logits_is_found_out() -> None:
    model = network(tiny_gpt2())
    forward = model.forward

    def forgetful(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Takes a cache, and reads as if there were none."""
        if past_key_values is not None:
            kwargs["attention_mask"] = None
        return forward(input_ids=input_ids, **kwargs)

    decoder = Decoder(model)
    model.forward = forgetful
    with pytest.warns(UserWarning, match="cannot be decoded from a cache"):
        probe(decoder)
    assert (decoder.pads, decoder.caches) == (True, False)


@pytest.mark.invariant(14)
def test_a_cache_whose_rows_are_repeated_in_another_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicCache

    def repeat(cache: Any, times: int) -> None:
        rows = torch.arange(2).repeat(times)  # 0 1 0 1, where 0 0 1 1 is wanted
        cache.batch_select_indices(rows)

    decoder = Decoder(network(tiny_gpt2()))
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", repeat)
    with pytest.warns(UserWarning, match="cannot be decoded from a cache"):
        probe(decoder)
    assert (decoder.pads, decoder.caches) == (True, False)


@pytest.mark.invariant(14)
@pytest.mark.parametrize("name", ["Bert", "XLNet"])
def test_a_model_that_looks_ahead_is_refused_by_name(name: str) -> None:
    import transformers

    small = {
        "Bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    }
    model = network(getattr(transformers, f"{name}Config")(vocab_size=24, **small[name]))
    with pytest.raises(ValueError, match=rf"`model={name}LMHeadModel` looks at tokens that come later"):
        probe(Decoder(model))


@pytest.mark.invariant(14)
def test_the_same_model_made_causal_is_not_refused() -> None:
    from transformers import BertConfig

    model = network(
        BertConfig(
            vocab_size=24,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            is_decoder=True,
        )
    )
    decoder = Decoder(model)
    probe(decoder)
    assert (decoder.pads, decoder.caches) == (True, True)


@pytest.mark.parametrize("is_training", [True, False])
def test_trying_a_model_out_leaves_its_mode_and_chance_alone(is_training: bool) -> None:
    decoder = Decoder(network(tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5)))
    decoder.train(is_training)
    state = torch.get_rng_state()
    probe(decoder)  # with dropout on, nothing would be found to pad or cache
    assert (decoder.pads, decoder.caches) == (True, True)
    assert decoder.training is is_training
    assert decoder.model.training is is_training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_half_precision_model_is_found_to_pad_and_cache() -> None:
    decoder = Decoder(network(tiny_gpt2()).bfloat16())
    probe(decoder)
    assert (decoder.pads, decoder.caches) == (True, True)


@pytest.mark.parametrize(
    ("name", "positions"), [("gpt2", 64), ("gptj", 64), ("opt", 64), ("llama", 64), ("bloom", None), ("mamba", None)]
)
def test_the_number_of_positions_is_the_configs(name: str, positions: int | None) -> None:
    assert Decoder(network(ARCHITECTURES[name]())).max_positions == positions


def test_a_negative_number_of_positions_is_no_limit() -> None:
    from transformers import XLNetConfig

    config = XLNetConfig(vocab_size=24, d_model=16, n_layer=1, n_head=2, d_inner=32)
    assert config.max_position_embeddings == -1
    assert Decoder(network(config)).max_positions is None


def test_the_width_is_that_of_what_the_head_reads() -> None:
    assert Decoder(network(tiny_gpt2(width=16))).width == 16
    assert Decoder(network(ARCHITECTURES["opt"]())).width == 8  # behind its projection
