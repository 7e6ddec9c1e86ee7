"""Encoder-decoders: one half reads prompts, the other writes responses, and numbers are those of the model alone."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM

from lightning_rlhf.models.encoder_decoder import EncoderDecoder, decoder_of
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.hydra import HydraReference, reference_of
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.reading import aligned
from lightning_rlhf.models.reference import Reference
from tests.networks import ENCODER_DECODERS, EOS, PAD, POSITIONS, VOCABULARY, network, random_rows, tiny_gpt2, written

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PROMPTS = random_rows([3, 9, 1, 6, 3], seed=1)
PROMPTS[4] = PROMPTS[0]
RESPONSES = random_rows([5, 2, 7, 1, 4], seed=2)
TEMPERATURE = 0.7
NAMES = [*ENCODER_DECODERS, "t5_untied", "bart_forced"]
FORCED = 5


def model_of(name: str, **more: Any) -> Any:
    """Also a T5 with a head of its own, as version 1.1 has it, and a BART that begins with a token."""
    model = network(ENCODER_DECODERS[name.split("_")[0] if name not in ENCODER_DECODERS else name](**more))
    if name == "t5_untied":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        model.config.tie_word_embeddings = False
    if name.startswith("bart"):
        generator = torch.Generator().manual_seed(1)
        model.final_logits_bias.normal_(generator=generator)
    if name == "bart_forced":
        model.generation_config.forced_bos_token_id = FORCED
    return model


def policy_of(name: str, num_layers_unfrozen: int = -1, **more: Any) -> Policy:
    torch.manual_seed(3)
    decoder = decoder_of(model_of(name, **more))
    probe(decoder)
    decoder.shares = True
    freeze(decoder, num_layers_unfrozen)
    return Policy(decoder, TEMPERATURE, ValueHead(decoder.width)).eval()


def prefix_of(name: str) -> list[int]:
    """What the models' papers begin a text with: T5 with PAD; BART with EOS, and its summaries with a forced token."""
    return [PAD] if "t5" in name else [EOS, FORCED] if name == "bart_forced" else [EOS]


def own(policy: Policy, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and values row by row, from the model's own forward on unpadded text."""
    model, prefix = policy.decoder.model, prefix_of(name)
    logprobs, values = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        states: list[Tensor] = []
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, x, states=states: states.append(x[0])
        )
        text = torch.tensor([prefix + response])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=text).logits[0]
        handle.remove()
        before = len(prefix) - 1
        all_of_them = (logits[before:-1].double() / TEMPERATURE).log_softmax(-1)
        logprobs.append(all_of_them.gather(1, torch.tensor(response)[:, None]).squeeze(1))
        values.append(policy.value_head(states[0])[0, before:-1])
    return logprobs, values


def gradients(policy: Policy, logprobs: Tensor, values: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    weights = torch.linspace(0.5, 1.5, len(logprobs))
    (weights * (logprobs.sin() + values)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert_close(found[key] / scale, value / scale, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


# --- what it says of responses --------------------------------------------------------------------------------------


@pytest.mark.invariant(1, 5, 7, 14, 15, 16)
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_logprobs_values_and_gradients_are_the_models_own_row_by_row(name: str, shares: bool) -> None:
    policy = policy_of(name).double()
    policy.decoder.shares = shares
    batch = written(PROMPTS, RESPONSES)
    mask = batch.response_mask
    output = policy(batch)
    logprobs, values = (torch.cat(parts) for parts in own(policy, name))
    assert_close(output.logprobs[mask], logprobs, **CLOSE)
    assert_close(output.values[mask], values, **CLOSE)
    expected = gradients(policy, logprobs, values)
    same(gradients(policy, policy(batch).logprobs[mask], policy(batch).values[mask]), expected)
    assert any("encoder" in key for key in expected)


@pytest.mark.invariant(1, 8)
@pytest.mark.parametrize("name", NAMES)
def test_padding_and_what_lies_in_it_change_nothing(name: str) -> None:
    policy = policy_of(name)
    batch = written(PROMPTS, RESPONSES)
    clean = policy(batch)
    for garbage in (PAD, -100, 10**6, EOS):
        batch.prompt_tokens = torch.where(batch.prompt_mask, batch.prompt_tokens, garbage)
        batch.response_tokens = torch.where(batch.response_mask, batch.response_tokens, garbage)
        dirty = policy(batch)
        assert torch.equal(dirty.logprobs, clean.logprobs)
        assert torch.equal(dirty.values, clean.values)
    for i in range(len(PROMPTS)):
        alone = policy(written(PROMPTS[i : i + 1], RESPONSES[i : i + 1]))
        assert_close(alone.logprobs[0], clean.logprobs[i, : len(RESPONSES[i])], **CLOSE)


@pytest.mark.invariant(9)
@pytest.mark.parametrize("name", NAMES)
def test_two_passes_over_the_same_rows_are_bit_equal(name: str) -> None:
    policy, batch = policy_of(name), written(PROMPTS, RESPONSES)
    learning = policy(batch).logprobs
    assert torch.equal(learning, policy(batch).logprobs)
    with torch.no_grad():
        reading = policy(batch).logprobs
        assert torch.equal(reading, policy(batch).logprobs)
    # torch takes another kernel where an attention mask, T5's position bias, has a gradient.
    assert_close(learning, reading, rtol=0, atol=1e-5 if "t5" in name else 0)


def test_a_prompt_that_several_rows_share_is_encoded_once() -> None:
    policy = policy_of("t5")
    read: list[tuple[int, ...]] = []
    block = policy.decoder.model.encoder.block[0]
    block.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape[:2])))
    policy(written(PROMPTS, RESPONSES))
    policy.decoder.shares = False
    policy(written(PROMPTS, RESPONSES))
    assert read == [(4, 9), (5, 9)]


@pytest.mark.invariant(5)
def test_the_encoder_reads_prompts_padded_right_and_the_decoder_begins_behind_its_prefix() -> None:
    decoder = policy_of("bart_forced").decoder
    reading = decoder.reading(written([[1, 2], [3, 4, 6]], [[7, 8], [9]], pad=20), None)
    assert reading.source.tokens.tolist() == [[1, 2, 0], [3, 4, 6]]
    assert reading.source.mask.tolist() == [[True, True, False], [True] * 3]
    assert reading.tokens.tolist() == [[EOS, FORCED, 7], [EOS, FORCED, 9]]
    assert reading.targets.tolist() == [[7, 8, 9]]
    assert reading.keep == 2
    assert reading.chosen.tolist() == [0, 1, 2]


@pytest.mark.invariant(5)
def test_padding_goes_to_the_side_that_was_asked_for() -> None:
    values = torch.tensor([[7, 7, 1, 2], [3, 4, 5, 6], [9, 9, 9, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    right = [[1, 2, 0, 0], [3, 4, 5, 6], [8, 0, 0, 0]]
    assert aligned(values, mask, "right").tolist() == right
    moved = aligned(mask, mask, "right")
    assert moved.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert aligned(torch.tensor(right), moved, "left").tolist() == [[0, 0, 1, 2], [3, 4, 5, 6], [0, 0, 0, 8]]
    wide = torch.stack([values, -values], dim=-1)
    assert aligned(wide, mask, "right")[..., 1].tolist() == (-torch.tensor(right)).tolist()


# --- what is found out about a model ----------------------------------------------------------------------------------


@pytest.mark.invariant(14)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_what_it_can_do_is_found_out_without_a_word(name: str) -> None:
    decoder = policy_of(name).decoder
    assert isinstance(decoder, EncoderDecoder)
    assert (decoder.pads, decoder.caches, decoder.chooses, decoder.unpads) == (True, True, True, False)
    assert decoder.is_plain == ("t5" in name)  # the others add a bias to logits
    assert decoder.prefix == tuple(prefix_of(name))
    halves = ["encoder.block", "decoder.block"] if "t5" in name else ["model.encoder.layers", "model.decoder.layers"]
    assert decoder.encoder_blocks == (f"{halves[0]}.0", f"{halves[0]}.1")
    assert decoder.blocks.blocks == (f"{halves[1]}.0", f"{halves[1]}.1")


def test_blocks_of_the_decoder_are_its_own_where_an_encoder_has_as_many_and_larger_ones() -> None:
    decoder = policy_of("bart", encoder_ffn_dim=512).decoder
    assert decoder.blocks.blocks == ("model.decoder.layers.0", "model.decoder.layers.1")
    deeper = policy_of("t5", num_layers=1, num_decoder_layers=3).decoder
    assert len(deeper.blocks.blocks) == 3
    assert deeper.encoder_blocks == ("encoder.block.0",)


def test_a_decoder_that_is_loaded_by_itself_has_no_encoder() -> None:
    from transformers import BartForCausalLM

    assert not decoder_of(BartForCausalLM(ENCODER_DECODERS["bart"]())).has_encoder
    assert not decoder_of(network(tiny_gpt2())).has_encoder


@pytest.mark.invariant(14)
def test_a_cache_that_gives_other_logits_is_found_out() -> None:
    model = model_of("t5")
    forward = model.decoder.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Takes a cache, and reads as if there were none."""
        if past_key_values is not None:
            kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    decoder = decoder_of(model)
    model.decoder.forward = forgetful
    with pytest.warns(UserWarning, match="T5ForConditionalGeneration cannot be decoded from a cache"):
        probe(decoder)
    assert not decoder.caches


@pytest.mark.invariant(14)
def test_a_model_whose_encoder_looks_at_padding_is_found_out() -> None:
    model = model_of("bart")
    forward = model.model.encoder.forward
    model.model.encoder.forward = lambda input_ids, attention_mask=None, **more: forward(input_ids, **more)
    decoder = decoder_of(model)
    with pytest.warns(UserWarning, match="cannot be padded"):
        probe(decoder)
    assert not decoder.pads


def test_a_model_that_does_more_than_its_halves_is_refused_by_name() -> None:
    model = model_of("t5")
    forward = model.forward

    def louder(input_ids: Any = None, **more: Any) -> Any:
        output = forward(input_ids=input_ids, **more)
        output.logits = output.logits * (1 if input_ids is None else 2)
        return output

    decoder = decoder_of(model)
    model.forward = louder
    with pytest.raises(ValueError, match="`policy=T5ForConditionalGeneration` does more than to hand what its encoder"):
        probe(decoder)


def test_a_model_that_knows_no_token_to_begin_with_is_refused() -> None:
    model = model_of("t5")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"has no start token.*set `decoder_start_token_id` in the model's generation"):
        decoder_of(model)


def test_a_token_to_begin_with_for_every_row_is_refused() -> None:
    """transformers reads a list as one token a row of a batch, which has other rows each time."""
    model = model_of("bart")
    model.generation_config.decoder_start_token_id = [EOS, FORCED]
    message = f"`decoder_start_token_id=[{EOS}, {FORCED}]` of `policy=BartForConditionalGeneration` must be one token"
    with pytest.raises(ValueError, match=re.escape(message)):
        decoder_of(model)


@pytest.mark.parametrize(("name", "prompt", "response"), [("t5", None, None), ("bart_forced", POSITIONS, 62)])
def test_prompts_have_the_encoders_room_and_responses_the_decoders(
    name: str, prompt: int | None, response: int | None
) -> None:
    policy = policy_of(name)
    assert policy.decoder.prompt_room(7) == prompt
    assert policy.decoder.response_room == response
    if prompt is None:
        policy.check_room(torch.ones(1, 10_000), 10_000)
        return
    policy.check_room(torch.ones(2, prompt), 62)
    message = (
        "`prompts`: number 0 of the batch has 65 tokens, which is more than the 64 that the policy's encoder reads:"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        policy.check_room(torch.ones(2, 65), 7)
    with pytest.raises(
        ValueError, match="`max_new_tokens=63` is more than the 62 tokens that the policy's decoder can"
    ):
        policy.check_room(torch.ones(2, 3), 63)


# --- frozen layers, kept states, reference ---------------------------------------------------------------------------


LAYERS = 3
DEEP: dict[str, Any] = {"t5": {"num_decoder_layers": LAYERS}, "bart": {"decoder_layers": LAYERS}}
TOP = {"t5": ["final_layer_norm"], "mbart": ["model.decoder.layer_norm."]}


def deep(name: str, num_layers_unfrozen: int) -> Policy:
    return policy_of(name, num_layers_unfrozen, **DEEP["t5" if "t5" in name else "bart"])


def expected_to_train(name: str, model: nn.Module, count: int) -> set[str]:
    """Names of parameters, from what the models' sources have behind the last block."""
    names = {key for key, _ in model.named_parameters()}
    if name in ("pegasus", "marian"):  # whose positions are sines
        names = {key for key in names if "embed_positions" not in key}
    if count in (-1, 0):
        return names if count == -1 else set()
    after = ["decoder.final_layer_norm."] if "t5" in name else ["model.decoder.layer_norm."]
    after += ["lm_head."] if name == "t5_untied" else []

    def is_top(key: str) -> bool:
        block = re.search(r"decoder\.(?:block|layers)\.(\d+)\.", key)
        return int(block[1]) >= LAYERS - count if block else any(key.startswith(place) for place in after)

    return {key for key in names if is_top(key)}


FROZEN = ["t5", "t5_gated", "t5_untied", "mt5", "bart", "mbart", "pegasus", "marian"]


@pytest.mark.invariant(10, 11, 14)
@pytest.mark.parametrize("num_layers_unfrozen", [-1, 0, 1, 2, LAYERS])
@pytest.mark.parametrize("name", FROZEN)
def test_exactly_the_top_of_the_decoder_trains_and_the_reference_stays(name: str, num_layers_unfrozen: int) -> None:
    policy = deep(name, num_layers_unfrozen)
    batch = written(PROMPTS, RESPONSES)
    reference = reference_of(policy, is_named=True)
    assert isinstance(reference, HydraReference) == (num_layers_unfrozen != -1)
    assert isinstance(reference.reader.decoder, EncoderDecoder)
    at_start = reference.logprobs(batch, 64)
    assert torch.equal(at_start, policy.scored(batch, 64))

    before = {key: parameter.detach().clone() for key, parameter in policy.named_parameters()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = policy(batch)
        (output.values - output.logprobs).mean().backward()
        optimizer.step()
    changed = {key for key, parameter in policy.named_parameters() if not torch.equal(parameter, before[key])}
    top = {f"decoder.model.{key}" for key in expected_to_train(name, policy.decoder.model, num_layers_unfrozen)}
    assert changed == top | {key for key in before if key.startswith("value_head.")}

    assert torch.equal(reference.logprobs(batch, 64), at_start)
    moved = (policy.scored(batch, 64) - at_start).abs().max()
    assert moved == 0.0 if num_layers_unfrozen == 0 else moved > 1e-3


def with_trunk(policy: Policy) -> Any:
    """Rollouts with what a first reading keeps: prompts by the encoder, prefix and responses by the lower blocks."""
    batch, decoder = written(PROMPTS, RESPONSES), policy.decoder
    tokens, _, encoded = decoder.begin(batch.prompt_tokens, batch.prompt_mask)
    tokens = torch.cat([tokens, batch.response_tokens[:, :-1]], dim=1)
    with torch.no_grad():
        trunk = decoder(tokens, torch.ones_like(tokens, dtype=torch.bool), keep=1, cache=encoded).trunk
    return dataclasses.replace(batch, trunk=trunk)


@pytest.mark.invariant(8, 12, 14)
@pytest.mark.parametrize("num_layers_unfrozen", [1, 2, LAYERS])
@pytest.mark.parametrize("name", [*FROZEN, "bart_forced"])
def test_a_pass_that_begins_with_kept_states_is_the_whole_pass(name: str, num_layers_unfrozen: int) -> None:
    policy = deep(name, num_layers_unfrozen).double()
    reference = reference_of(policy, is_named=True)
    batch = with_trunk(policy)
    assert batch.trunk.shape[1] == 9 + len(prefix_of(name)) + 7 - 1
    ran: list[str] = []
    for block in policy.decoder.encoder_blocks + policy.decoder.trunk.frozen:
        module = policy.decoder.model.get_submodule(block)
        module.register_forward_pre_hook(lambda _, inputs, block=block: ran.append((block, len(inputs[0]))))
    mask = batch.response_mask
    kept = policy(batch)
    # T5's first block makes the position bias of all, alike for all rows: one of them is enough.
    assert ran == ([("decoder.block.0", 1)] if "t5" in name and num_layers_unfrozen < LAYERS else [])
    whole = policy(written(PROMPTS, RESPONSES))
    for part in ("logprobs", "entropy", "values"):
        assert_close(getattr(kept, part)[mask], getattr(whole, part)[mask], **CLOSE)
    found, expected = (gradients(policy, output.logprobs[mask], output.values[mask]) for output in (kept, whole))
    same(found, expected)
    assert_close(reference.logprobs(batch, 2), reference.logprobs(written(PROMPTS, RESPONSES), 2), **CLOSE)


@pytest.mark.invariant(12, 28)
@pytest.mark.parametrize("name", ["t5", "bart_forced"])
def test_rows_and_columns_of_what_is_kept_stay_with_their_tokens(name: str) -> None:
    policy = deep(name, 1)
    batch = with_trunk(policy)
    rows = torch.tensor([3, 0])
    piece = batch.select(rows).trimmed()
    assert piece.trunk.shape[1] == 6 + len(prefix_of(name)) + 5 - 1
    whole = policy(written(PROMPTS, RESPONSES)).logprobs[rows][:, :5]
    assert_close(policy(piece).logprobs[piece.response_mask], whole[piece.response_mask], **CLOSE)


def test_what_blocks_return_beside_their_states_may_differ_from_row_to_row() -> None:
    """Then the first block reads all rows for it."""
    model = model_of("t5", num_decoder_layers=LAYERS)

    class OfRows(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            output, bias, more = self.block(states, *args, **kwargs)
            return output, bias * states[:, :1, :1, None] if len(bias) == 1 else bias, more

    model.decoder.block[0] = OfRows(model.decoder.block[0])
    decoder = decoder_of(model)
    with pytest.warns(UserWarning, match="cannot be decoded from a cache"):
        probe(decoder)
    freeze(decoder, 1)
    policy = Policy(decoder, TEMPERATURE).double().eval()
    read: list[int] = []
    batch = with_trunk(policy)
    model.decoder.block[0].register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    kept = policy(batch).logprobs
    assert read == [5]
    assert_close(kept, policy(written(PROMPTS, RESPONSES)).logprobs, **CLOSE)


def test_an_encoder_that_is_wider_than_the_decoder_runs_in_every_pass() -> None:
    from transformers import BertConfig, EncoderDecoderConfig

    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    small |= {"max_position_embeddings": POSITIONS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    halves = [BertConfig(hidden_size=width, **small) for width in (24, 16)]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*halves, decoder_start_token_id=PAD, pad_token_id=PAD)
    torch.manual_seed(0)
    decoder = decoder_of(AutoModelForSeq2SeqLM.from_config(config).eval())
    probe(decoder)
    assert (decoder.pads, decoder.caches) == (True, True)
    with pytest.warns(UserWarning, match="EncoderDecoderModel cannot begin in its middle: its frozen blocks run"):
        freeze(decoder, 1)
    policy = Policy(decoder, TEMPERATURE).eval()
    policy.decoder.prefix = (PAD,)
    logits = decoder.model(
        input_ids=torch.tensor([PROMPTS[1]]), decoder_input_ids=torch.tensor([[PAD, *RESPONSES[1]]])
    ).logits[0]
    expected = (logits / TEMPERATURE).log_softmax(-1)[range(2), RESPONSES[1]]
    assert_close(policy(written(PROMPTS, RESPONSES)).logprobs[1, :2], expected, **CLOSE)


@pytest.mark.invariant(12)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_the_policy_kept_is_nothing_to_another_model(name: str) -> None:
    batch = with_trunk(deep(name, 1))
    other = policy_of(name)
    assert torch.equal(other.scored(batch, 2), other.scored(written(PROMPTS, RESPONSES), 2))


@pytest.mark.invariant(11)
def test_a_full_copy_is_an_encoder_decoder_too() -> None:
    policy, batch = policy_of("t5"), written(PROMPTS, RESPONSES)
    reference = Reference.copied_from(policy, is_named=True)
    assert torch.equal(reference.logprobs(batch, 2), policy.scored(batch, 2))
    assert reference.reader.decoder.encoder_blocks == policy.decoder.encoder_blocks
