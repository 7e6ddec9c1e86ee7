"""The decode loop: against transformers' own, against training passes, and on scripts written by hand."""

from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.generation import steps
from lightning_rlhf.generation.decode import Decoded, DecodeLoop
from lightning_rlhf.generation.sampling import Sampling
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.vocabulary import SpecialTokens
from tests.networks import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    EOS,
    ODD,
    PAD,
    USUAL,
    VOCABULARY,
    Scripted,
    bigram,
    network,
    random_rows,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PROMPTS = random_rows([3, 9, 1, 6, 5, 2, 8, 4], seed=1)
EVERY = [*ARCHITECTURES, *ENCODER_DECODERS]
ENDS = SpecialTokens((EOS, 3, 7, 11), PAD)  # so many that random networks end at different places


def policy_of(name: str, temperature: float = 1.0, seed: int = 0, spread: float = 1.0) -> Policy:
    torch.manual_seed(3)
    decoder = decoder_of(network({**ARCHITECTURES, **ENCODER_DECODERS}[name](), seed=seed, spread=spread))
    if name in ODD:
        decoder.caches = False
        decoder.pads = name != "rwkv"
    return Policy(decoder, temperature, ValueHead(decoder.width)).eval()


def prompts_for(policy: Policy) -> list[list[int]]:
    return PROMPTS if policy.decoder.pads else random_rows([5] * 8, seed=1)


def decoded(
    policy: Any,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    special: SpecialTokens = ENDS,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> Decoded:
    """Responses to prompts, each with the chance of its row."""
    tokens, mask = padded(prompts, PAD, "left")
    rows = range(len(prompts)) if rows is None else rows
    return DecodeLoop(policy, sampling, special, **options)(
        tokens, mask, row_uniforms(0, "rollout", (), rows, sampling.max_new_tokens)
    )


def responses(out: Decoded) -> list[list[int]]:
    return [row[row_mask].tolist() for row, row_mask in zip(out.tokens, out.mask, strict=True)]


# --- on a script ----------------------------------------------------------------------------------------------------


LINES = [[5, 6, EOS, 9], [8, EOS], [5, 5, 5, 5, 5, 5], [EOS], [1, 2, 3, 4, EOS], [9, 9, 9, 9, 9, EOS]]
SIX = Sampling(max_new_tokens=6)


def scripted(
    sampling: Sampling = SIX, lines: Sequence[Sequence[int]] = LINES, **options: Any
) -> tuple[Decoded, Scripted]:
    prompts = [[i, *range(12, 12 + i)] for i in range(len(lines))]
    policy = Scripted(lines, prompt_width=len(lines))
    options = {"special": SpecialTokens((EOS,), PAD), **options}
    return decoded(policy, sampling, prompts, **options), policy


@pytest.mark.invariant(3, 4)
@pytest.mark.parametrize("pad", [PAD, EOS, 0], ids=["pad is its own", "pad is eos", "pad is a word"])
@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 2.0])
def test_a_response_ends_with_its_eos_and_nothing_comes_after(
    pad: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "DROP_FINISHED_AT", share)
    out, _ = scripted(special=SpecialTokens((EOS,), pad))
    assert responses(out) == [
        [5, 6, EOS],
        [8, EOS],
        [5, 5, 5, 5, 5, 5],
        [EOS],
        [1, 2, 3, 4, EOS],
        [9, 9, 9, 9, 9, EOS],
    ]
    assert out.mask.sum(1).tolist() == [3, 2, 6, 1, 5, 6]
    assert out.mask.tolist() == [[t < n for t in range(6)] for n in (3, 2, 6, 1, 5, 6)]
    assert set(out.tokens[~out.mask].tolist()) == {pad}
    assert out.truncated.tolist() == [False, False, True, False, False, False]


@pytest.mark.invariant(4)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6])
def test_what_is_cut_at_max_new_tokens_is_marked(length: int) -> None:
    out, policy = scripted(Sampling(max_new_tokens=length))
    assert out.tokens.shape == (6, length)
    assert responses(out) == [line[: line.index(EOS) + 1 if EOS in line else None][:length] for line in LINES]
    assert out.truncated.tolist() == [EOS not in line[:length] for line in LINES]
    assert len(policy.batch_sizes) == length


@pytest.mark.invariant(4)
def test_decoding_ends_with_the_last_row() -> None:
    out, policy = scripted(Sampling(max_new_tokens=40), lines=[line for line in LINES if EOS in line])
    assert out.tokens.shape == (5, 6)
    assert len(policy.batch_sizes) == 6
    assert not bool(out.truncated.any())


@pytest.mark.invariant(3)
def test_every_token_that_ends_a_text_ends_it() -> None:
    out, _ = scripted(special=SpecialTokens((EOS, 6, 9), PAD))
    assert responses(out) == [[5, 6], [8, EOS], [5] * 6, [EOS], [1, 2, 3, 4, EOS], [9]]
    assert out.truncated.tolist() == [False, False, True, False, False, False]


@pytest.mark.invariant(5)
def test_values_are_those_of_the_states_before_their_tokens() -> None:
    out, _ = scripted()
    expected = torch.tensor([[100.0 * i + t for t in range(6)] for i in range(6)])
    assert torch.equal(out.values[out.mask], expected[out.mask])
    assert set(out.values[~out.mask].tolist()) == {0.0}
    assert out.final_values is None


@pytest.mark.parametrize("share", [0.0, 0.125, 2.0])
def test_the_final_value_is_that_of_the_state_after_what_was_cut_off(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "DROP_FINISHED_AT", share)
    out, _ = scripted(Sampling(max_new_tokens=3), with_final_values=True)
    assert out.truncated.tolist() == [False, False, True, False, True, True]
    assert out.final_values.tolist() == [0.0, 0.0, 203.0, 0.0, 403.0, 503.0]
    everything, _ = scripted(Sampling(max_new_tokens=40), lines=[[EOS], [1, EOS]], with_final_values=True)
    assert everything.final_values.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("share", "sizes"),
    [
        (0.0, [6, 5, 4, 3, 3, 2]),
        (0.125, [6, 5, 4, 3, 3, 2]),
        (0.3, [6, 6, 4, 4, 4, 2]),
        (0.5, [6, 6, 6, 3, 3, 3]),
        (2.0, [6, 6, 6, 6, 6, 6]),
    ],
)
def test_rows_that_have_ended_leave_when_enough_of_them_have(
    share: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "DROP_FINISHED_AT", share)
    out, policy = scripted()
    assert policy.batch_sizes == sizes
    assert out.truncated.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("least", [1, 2, 4])
def test_eos_is_not_drawn_before_min_new_tokens_and_may_be_after(least: int) -> None:
    """Where the script wants EOS too early, all other tokens are equally likely."""
    lines = [[EOS] * 6 for _ in range(6)]
    out, _ = scripted(Sampling(max_new_tokens=6, min_new_tokens=least), lines=lines)
    assert out.mask.sum(1).tolist() == [least + 1] * 6
    assert out.tokens[:, least].tolist() == [EOS] * 6
    assert EOS not in out.tokens[:, :least].tolist()[0]
    assert not bool((out.tokens[:, :least] == EOS).any())
    assert len(set(out.tokens[:, 0].tolist())) > 1
    assert float(out.kept_mass[:, :least].max()) < 1e-30
    assert out.kept_mass[:, least].tolist() == [1.0] * 6
    assert_close(out.logprobs[:, :least], torch.full((6, least), -1e4), rtol=1e-6, atol=0.0)


def test_without_a_value_head_there_are_no_values() -> None:
    out = decoded(Policy(policy_of("gpt2").decoder), SIX, PROMPTS)
    assert (out.values, out.final_values, out.kept_mass) == (None, None, None)


# --- against transformers -------------------------------------------------------------------------------------------


def generated(policy: Policy, prompts: list[list[int]], special: SpecialTokens, **settings: Any) -> list[list[int]]:
    """What transformers writes, one unpadded prompt at a time."""
    rows = []
    begun = getattr(policy.decoder, "prefix", None)  # of a response that goes on from no prompt
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        text = policy.decoder.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            eos_token_id=list(special.eos) or None,
            pad_token_id=special.pad,
            **settings,
        )
        rows.append(text[0, len(prompt if begun is None else begun) :].tolist())
    return rows


@pytest.mark.invariant(2, 3, 14)
@pytest.mark.parametrize("least", [0, 6])
@pytest.mark.parametrize("name", EVERY)
def test_greedy_responses_are_those_of_transformers_without_padding(name: str, least: int) -> None:
    policy = policy_of(name, spread=3.0)
    prompts = prompts_for(policy)
    sampling = Sampling(max_new_tokens=14, min_new_tokens=least, temperature=0.0)
    for special in (ENDS, SpecialTokens((PAD,), PAD)):
        expected = generated(policy, prompts, special, max_new_tokens=14, min_new_tokens=least)
        out = decoded(policy, sampling, prompts, special)
        assert responses(out) == expected
        assert out.truncated.tolist() == [row[-1] not in special.eos for row in expected]


@pytest.mark.invariant(2, 14)
@pytest.mark.parametrize("name", EVERY)
def test_greedy_responses_are_those_of_whole_texts_read_anew(name: str) -> None:
    policy = policy_of(name, seed=1, spread=3.0)
    prompts = prompts_for(policy)
    out = decoded(policy, Sampling(max_new_tokens=12, temperature=0.0), prompts, SpecialTokens((EOS,), PAD))
    for prompt, response in zip(prompts, responses(out), strict=True):
        text = [] if policy.decoder.has_encoder else list(prompt)
        begun = len(text)
        for _ in response:
            if policy.decoder.has_encoder:
                written = torch.tensor([[*policy.decoder.prefix, *text]])
                read = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": written}
            else:
                read = {"input_ids": torch.tensor([text])}
            with torch.no_grad():
                text.append(int(policy.decoder.model(**read).logits[0, -1].argmax()))
        assert response == text[begun:]


@pytest.mark.invariant(7, 14)
@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_token_that_is_forced_is_no_part_of_the_response(name: str, caches: bool) -> None:
    model = network(ENCODER_DECODERS[name](), spread=3.0)
    model.generation_config.forced_bos_token_id = 13
    decoder = decoder_of(model)
    decoder.caches = caches
    policy = Policy(decoder).eval()
    expected = generated(policy, PROMPTS, ENDS, max_new_tokens=13)
    out = decoded(policy, Sampling(max_new_tokens=12, temperature=0.0), PROMPTS)
    assert responses(out) == expected
    assert len({tuple(row) for row in expected}) > 1
    with torch.no_grad():
        assert_close(out.logprobs[out.mask], policy(trained_on(PROMPTS, out)).logprobs[out.mask], **CLOSE)


# --- against a training pass ----------------------------------------------------------------------------------------


def trained_on(prompts: Sequence[Sequence[int]], out: Decoded) -> Any:
    tokens, mask = padded(prompts, PAD, "left")
    return SimpleNamespace(prompt_tokens=tokens, prompt_mask=mask, response_tokens=out.tokens, response_mask=out.mask)


@pytest.mark.invariant(7, 9, 16)
@pytest.mark.parametrize("name", EVERY)
def test_the_samplers_logprobs_and_values_are_those_of_a_training_pass(name: str) -> None:
    policy = policy_of(name, temperature=0.8)
    prompts = prompts_for(policy)
    out = decoded(policy, Sampling(max_new_tokens=12, temperature=0.8), prompts, with_final_values=True)
    lengths = out.mask.sum(1).tolist()
    assert len(set(lengths)) >= (2 if policy.decoder.has_encoder else 3)
    output = policy(trained_on(prompts, out))
    assert_close(out.logprobs[out.mask], output.logprobs[out.mask].detach(), **CLOSE)
    assert_close(out.values[out.mask], output.values[out.mask].detach(), **CLOSE)
    assert out.logprobs.dtype == torch.float32


@pytest.mark.invariant(16)
@pytest.mark.parametrize("narrowing", [{"top_k": 3}, {"top_p": 0.5}, {"min_new_tokens": 3}])
def test_logprobs_are_the_policys_where_the_draw_was_narrowed(narrowing: dict[str, Any]) -> None:
    policy = policy_of("gpt2", temperature=0.8)
    out = decoded(policy, Sampling(max_new_tokens=12, temperature=0.8, **narrowing), PROMPTS)
    output = policy(trained_on(PROMPTS, out))
    assert_close(out.logprobs[out.mask], output.logprobs[out.mask].detach(), **CLOSE)
    assert bool((out.kept_mass[out.mask] <= 1.0 + 1e-6).all())
    assert bool((out.kept_mass[out.mask] >= out.logprobs[out.mask].exp() - 1e-6).all())
    assert float(out.kept_mass[out.mask].min()) < 0.99


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "openai_gpt", "rwkv"])
def test_final_values_are_those_of_a_plain_pass_over_prompt_and_response(name: str) -> None:
    policy = policy_of(name)
    prompts = prompts_for(policy)
    out = decoded(policy, Sampling(max_new_tokens=4), prompts, with_final_values=True)
    assert 0 < int(out.truncated.sum()) < len(prompts)
    for i, (prompt, response) in enumerate(zip(prompts, responses(out), strict=True)):
        expected = torch.zeros(())
        if bool(out.truncated[i]):
            states: list[Tensor] = []
            handle = policy.decoder.model.get_output_embeddings().register_forward_hook(
                lambda _, inputs, output, states=states: states.append(inputs[0])
            )
            with torch.no_grad():
                policy.decoder.model(input_ids=torch.tensor([prompt + response]))
                expected = policy.value_head(states[0][:, -1:])[0, 0]
            handle.remove()
        assert_close(out.final_values[i], expected, **CLOSE)


# --- who else is there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "bloom", "openai_gpt", "t5", "bart"])
def test_a_response_does_not_depend_on_who_else_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(name)
    sampling = Sampling(max_new_tokens=12)
    together = decoded(policy, sampling, PROMPTS)
    assert len(set(together.mask.sum(1).tolist())) >= 3
    for share in (0.0, 0.5, 2.0):
        monkeypatch.setattr(steps, "DROP_FINISHED_AT", share)
        again = decoded(policy, sampling, PROMPTS)
        assert torch.equal(again.tokens, together.tokens)
        assert torch.equal(again.mask, together.mask)
        assert_close(again.logprobs[again.mask], together.logprobs[together.mask], **CLOSE)
        assert_close(again.values[again.mask], together.values[together.mask], **CLOSE)
    for rows in ([0], [1], [2], [3], [4], [4, 2], [1, 3, 0]):
        alone = decoded(policy, sampling, [PROMPTS[i] for i in rows], rows=rows)
        assert responses(alone) == [responses(together)[i] for i in rows]
        assert alone.truncated.tolist() == together.truncated[rows].tolist()
        for i, row in enumerate(rows):
            assert_close(alone.logprobs[i][alone.mask[i]], together.logprobs[row][together.mask[row]], **CLOSE)


@pytest.mark.invariant(7)
@pytest.mark.parametrize("name", EVERY)
def test_a_group_whose_prompt_is_read_once_writes_what_it_would_if_each_row_read_it(name: str) -> None:
    policy = policy_of(name)
    prompts = prompts_for(policy)[:4]
    tokens, mask = padded(prompts, PAD, "left")
    uniforms = row_uniforms(0, "rollout", (), range(12), 10)
    loop = DecodeLoop(policy, Sampling(max_new_tokens=10), ENDS, with_final_values=True)
    apart = loop(tokens.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), uniforms)

    widths, sizes = [], []
    read = policy.next_token
    policy.next_token = lambda tokens, *more: (  # type: ignore[method-assign]
        sizes.append(len(tokens)) or widths.append(tokens.shape[1]) or read(tokens, *more)
    )
    together = loop(tokens, mask, uniforms, group_size=3)
    assert responses(together) == responses(apart)
    assert len({tuple(response) for response in responses(together)[:3]}) > 1
    assert len(set(together.mask.sum(1).tolist())) >= 3
    for field in ("mask", "truncated"):
        assert torch.equal(getattr(together, field), getattr(apart, field))
    for field in ("logprobs", "values", "final_values"):
        assert_close(getattr(together, field), getattr(apart, field), **CLOSE)
    assert sizes[0] == 4 < sizes[1]
    caches, begun = policy.decoder.caches, 1 if policy.decoder.has_encoder else tokens.shape[1]
    assert widths == [begun + t if t == 0 or not caches else 1 for t in range(len(widths))]


@pytest.mark.invariant(8)
@pytest.mark.parametrize("name", [*USUAL, "mixtral", "openai_gpt", "mamba", *ENCODER_DECODERS])
def test_what_lies_in_the_padding_of_prompts_changes_nothing_bit_for_bit(name: str) -> None:
    policy = policy_of(name)
    tokens, mask = padded(PROMPTS, PAD, "left")
    uniforms = row_uniforms(0, "rollout", (), range(len(PROMPTS)), 8)
    loop = DecodeLoop(policy, Sampling(max_new_tokens=8), ENDS, with_final_values=True)
    clean = loop(tokens, mask, uniforms)
    for garbage in (torch.randint(VOCABULARY, tokens.shape), torch.tensor(-100), torch.tensor(10**6)):
        dirty = torch.where(mask, tokens, garbage)
        before = dirty.clone()
        out = loop(dirty, mask, uniforms)
        for field in ("tokens", "mask", "logprobs", "values", "final_values"):
            assert torch.equal(getattr(out, field), getattr(clean, field)), field
        assert torch.equal(dirty, before)


def test_a_model_that_cannot_be_padded_refuses_prompts_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="`policy=RwkvForCausalLM` cannot be padded.*prompts of one length"):
        decoded(policy_of("rwkv"), Sampling(max_new_tokens=3), PROMPTS)


def test_decoding_computes_no_gradient() -> None:
    out = decoded(policy_of("gpt2"), Sampling(max_new_tokens=3), PROMPTS, with_final_values=True)
    assert not any(x.requires_grad for x in (out.logprobs, out.values, out.final_values))


def test_a_half_precision_model_decodes_to_single_precision() -> None:
    policy = policy_of("gpt2")
    policy.decoder.model.bfloat16()
    out = decoded(policy, Sampling(max_new_tokens=6), PROMPTS, with_final_values=True)
    assert {x.dtype for x in (out.logprobs, out.values, out.final_values)} == {torch.float32}
    output = policy(trained_on(PROMPTS, out))
    assert_close(out.logprobs[out.mask], output.logprobs[out.mask].detach(), rtol=0.0, atol=0.1)


# --- how often ------------------------------------------------------------------------------------------------------

FOLLOWS = torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.2, 0.5], [0.5, 0.25, 0.25]])  # 2 ends a response


class Worth(nn.Module):
    """The value of a state is 10, 20 or 30 for the token before it; see :func:`bigram`."""

    def forward(self, states: Tensor) -> Tensor:
        return states[..., :3] @ torch.tensor([10.0, 20.0, 30.0]) / 3**0.5


def chances(temperature: float) -> dict[tuple[int, ...], float]:
    """Of every response of up to three tokens after token 0."""
    table = FOLLOWS.double() ** (1.0 / temperature)
    table = table / table.sum(1, keepdim=True)
    found = {}
    for length in (1, 2, 3):
        for response in product(range(3), repeat=length):
            if 2 in response[:-1] or (length < 3 and response[-1] != 2):
                continue
            steps = zip((0, *response), response, strict=False)
            found[response] = float(torch.stack([table[i, j] for i, j in steps]).prod())
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-9)
    return found


@pytest.mark.invariant(5, 16)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_whole_responses_come_as_often_as_they_should(temperature: float) -> None:
    n = 20_000
    policy = Policy(Decoder(bigram(FOLLOWS)), temperature, Worth()).eval()
    sampling = Sampling(max_new_tokens=3, temperature=temperature)
    out = decoded(policy, sampling, [[0]] * n, SpecialTokens((2,), 2))
    expected = chances(temperature)
    written = [tuple(response) for response in responses(out)]
    chi_square = sum((written.count(key) - n * p) ** 2 / (n * p) for key, p in expected.items())
    assert set(written) <= set(expected)
    assert chi_square < 32.9  # of 14 - 1 degrees of freedom, exceeded by chance less than once in five hundred

    for i in range(50):
        assert float(out.logprobs[i].sum().exp()) == pytest.approx(expected[written[i]], rel=1e-4)
        before = [0, *written[i][:-1]]
        assert out.values[i][out.mask[i]].tolist() == pytest.approx([10.0 * (j + 1) for j in before], rel=1e-4)
