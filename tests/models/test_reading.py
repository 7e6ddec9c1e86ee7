"""Rows one behind the other: the same log-probs and gradients as rows side by side, and nobody looks at a neighbour."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.models import attention
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.reading import first_with_prompt, padded, pays, pieces, unpadded
from tests.networks import ARCHITECTURES, deep, network, random_rows, tiny_gpt2, written

UNPADS = ["gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma", "mistral", "phi", "gpt_bigcode", "mixtral"]
PADS = ["gptj", "bloom", "gemma2", "gpt_neo"]
SHARED, OTHER, LONG = random_rows([5, 3, 14], seed=4)
PROMPTS = [SHARED, OTHER, SHARED, LONG, SHARED, LONG]
RESPONSES = random_rows([4, 9, 1, 6, 12, 2], seed=5)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def policy_of(config: Any, num_layers_unfrozen: int = -1) -> Policy:
    torch.manual_seed(3)
    decoder = Decoder(network(config))
    probe(decoder)
    freeze(decoder, num_layers_unfrozen)
    decoder.shares = True
    decoder.block_size = 10**9  # of such blocks padding always costs more than attending row by row
    return Policy(decoder, 0.7, ValueHead(decoder.width)).eval()


def gradients(policy: Policy, batch: Rollouts, **how: bool) -> dict[str, Tensor]:
    """What a pass says and the gradient of a sum in which everything counts differently."""
    for name, value in how.items():
        setattr(policy.decoder, name, value)
    policy.zero_grad()
    output = policy(batch)
    weights = torch.linspace(0.5, 1.5, batch.response_mask.numel()).view(batch.response_mask.shape)
    mask = batch.response_mask
    (weights * (output.logprobs.sin() + output.values + 0.1 * output.entropy))[mask].sum().backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return {**found, **{name: getattr(output, name).detach()[mask] for name in ("logprobs", "entropy", "values")}}


@pytest.mark.invariant(1, 12, 15, 30)
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", UNPADS)
def test_outputs_and_gradients_are_those_of_padded_rows(name: str, shares: bool) -> None:
    policy, batch = policy_of(ARCHITECTURES[name]()), written(PROMPTS, RESPONSES)
    assert policy.decoder.unpads
    if name != "mixtral":  # which gives NaN in double precision
        policy.double()
    expected = gradients(policy, batch, unpads=False)
    found = gradients(policy, batch, unpads=True, shares=shares)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert_close(found[key] / scale, value / scale, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.invariant(1, 30)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt", "qwen3"])
def test_attention_is_the_same_spelt_out_and_by_torchs_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ARCHITECTURES[name]()
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads
    policy, batch = policy_of(config).double(), written(PROMPTS, RESPONSES)
    spelt: list[int] = []
    plain = attention._spelt_out
    monkeypatch.setattr(attention, "_spelt_out", lambda *given: spelt.append(given[0].shape[2]) or plain(*given))
    found = gradients(policy, batch, unpads=True, shares=False)
    lengths = (batch.prompt_mask.sum(1) + batch.response_mask.sum(1) - 1).tolist()
    assert sorted(spelt) == sorted(lengths * config.num_hidden_layers)
    spelt.clear()
    monkeypatch.setattr(attention, "SHORT", 0)
    expected = gradients(policy, batch, unpads=True, shares=False)
    assert not spelt
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", PADS)
def test_what_cannot_be_read_so_is_padded_as_before(name: str) -> None:
    policy = policy_of(ARCHITECTURES[name]())
    assert not policy.decoder.unpads
    assert policy.decoder.model.config._attn_implementation in ("eager", "sdpa")


@pytest.mark.invariant(1)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_no_row_looks_at_its_neighbours(name: str) -> None:
    policy = policy_of(ARCHITECTURES[name]()).double()
    batch = written(PROMPTS, RESPONSES)
    together = policy(batch)
    for i in range(len(PROMPTS)):
        alone = policy(written(PROMPTS[i : i + 1], RESPONSES[i : i + 1]))
        length = len(RESPONSES[i])
        assert_close(together.logprobs[i, :length], alone.logprobs[0], **CLOSE)
        assert not together.logprobs[i, length:].any()


@pytest.mark.invariant(12)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_blocks_read_real_tokens_only_and_a_shared_prompt_once(name: str) -> None:
    policy = policy_of(ARCHITECTURES[name]())
    read: list[int] = []
    block = policy.decoder.model.get_submodule(policy.decoder.blocks.blocks[0])
    block.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2].numel()))
    batch = written(PROMPTS, RESPONSES)
    policy(batch)
    policy.decoder.shares = False
    policy(batch)
    responses = sum(len(row) - 1 for row in RESPONSES)
    assert read == [
        len(SHARED) + len(OTHER) + len(LONG) + responses,
        sum(len(row) for row in PROMPTS) + responses,
    ]


@pytest.mark.invariant(12, 14)
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "mistral"])
def test_kept_states_of_frozen_blocks_are_put_in_line_too(name: str) -> None:
    policy = policy_of(deep(name), num_layers_unfrozen=2).double()
    batch = written(PROMPTS, RESPONSES)
    reading = padded(batch, None, chooses=True)
    with torch.no_grad():
        trunk = policy.decoder(reading.tokens, reading.mask.bool(), keep=1).trunk
    ran: list[int] = []
    policy.decoder.model.get_submodule(policy.decoder.blocks.blocks[0]).register_forward_hook(lambda *_: ran.append(1))
    kept = gradients(policy, dataclasses.replace(batch, trunk=trunk))
    assert not ran
    for key, value in gradients(policy, batch).items():
        assert_close(kept[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_gradients_that_are_recomputed_are_the_same() -> None:
    policy, batch = policy_of(tiny_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)), written(PROMPTS, RESPONSES)
    policy.train()
    expected = gradients(policy, batch)
    ran: list[int] = []
    policy.decoder.model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    policy.decoder.model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(policy, batch)
    assert len(ran) == 2
    for key, value in expected.items():
        assert_close(found[key], value, **CLOSE)


@pytest.mark.invariant(1, 8)
def test_a_long_line_is_filled_up_and_nothing_changes() -> None:
    policy = policy_of(tiny_gpt2()).double()
    prompts, responses = random_rows([20] * 12, seed=6), random_rows([9, 11, 7] * 4, seed=7)
    batch = written(prompts, responses)
    line = unpadded(batch, None, first_with_prompt(batch, shares=False))
    real = sum(len(row) for row in prompts) + sum(len(row) - 1 for row in responses)
    assert real % 32 != 0
    assert line.tokens.shape[1] == int(line.mask[..., 0].sum()) == real + 32 - real % 32
    found = gradients(policy, batch)
    for key, value in gradients(policy, batch, unpads=False).items():
        assert_close(found[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.invariant(5)
def test_a_line_of_two_rows_by_hand() -> None:
    batch = written([[4, 5], [4, 5]], [[6, 7], [8, 9, 10]])
    reading = unpadded(batch, None, first_with_prompt(batch, shares=True))
    assert reading.tokens.tolist() == [[4, 5, 6, 8, 9]]
    assert reading.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert reading.chosen.tolist() == [1, 2, 1, 3, 4]
    assert reading.targets.tolist() == [[6, 7, 8, 9, 10]]
    assert reading.mask.tolist() == [[[[2, -1], [1, 0], [2, 0]]]]
    apart = unpadded(batch, None, first_with_prompt(batch, shares=False))
    assert apart.tokens.tolist() == [[4, 5, 6, 4, 5, 8, 9]]
    assert apart.chosen.tolist() == [1, 2, 4, 5, 6]
    assert apart.mask.tolist() == [[[[3, -1], [4, -1]]]]


def test_an_export_does_not_name_our_attention(tmp_path: Any) -> None:
    policy = policy_of(tiny_gpt2())
    policy.decoder.model.save_pretrained(tmp_path)
    assert "lightning_rlhf" not in (tmp_path / "config.json").read_text()


def test_short_rows_of_a_small_network_are_padded_and_long_ones_of_a_large_network_are_not() -> None:
    short = written(random_rows([4] * 8), random_rows([6, 9] * 4))
    long = written(random_rows([48, 64] * 4), random_rows([40, 64] * 4))
    small, large = 280_000, 3_150_000  # parameters of the blocks of random walks' network, and of one of width 512
    assert [pays(batch, list(range(8)), size) for size in (small, large) for batch in (short, long)] == [
        False,
        True,
        True,
        True,
    ]
    no_padding = written(random_rows([48] * 8), random_rows([64] * 8))
    assert not pays(no_padding, list(range(8)), large)
    assert pays(no_padding, [0] * 8, large)  # of one prompt


def test_what_cannot_be_padded_is_put_in_line_even_where_that_costs_more() -> None:
    policy, batch = policy_of(tiny_gpt2()), written(PROMPTS, RESPONSES)
    policy.decoder.block_size = 0
    assert policy.decoder.line(batch) is None
    policy.decoder.pads = False
    assert policy.decoder.line(batch) == [0, 1, 0, 3, 0, 3]


ROWS = torch.tensor([5, 0, 3, 1, 4, 2])


def of_pieces(batch: Rollouts, **how: Any) -> list[list[int]]:
    return [piece.tolist() for piece in pieces(batch, ROWS, **{"size": 2, **how})]


def test_rows_are_split_in_their_order_where_padding_costs_nothing_and_else_by_length() -> None:
    batch = written(PROMPTS, RESPONSES)
    assert of_pieces(batch, unpads=True) == [[0, 1], [2, 3], [4, 5]]
    assert of_pieces(batch, unpads=False) == [[2, 5], [0, 3], [1, 4]]  # responses of 1, 2, 4, 6, 9, 12 tokens


def test_a_pass_takes_so_many_tokens_and_a_longer_row_goes_alone() -> None:
    batch = written(PROMPTS, RESPONSES)
    # Prompts and responses together: 9, 12, 6, 20, 17, 16.
    assert of_pieces(batch, unpads=True, tokens=21) == [[0, 1], [2], [3], [4], [5]]
    assert of_pieces(batch, unpads=True, tokens=10) == [[0], [1], [2], [3], [4], [5]]
    assert of_pieces(batch, unpads=True, tokens=1000) == [[0, 1, 2, 3, 4, 5]]
    # With padding: row 2, then 2 and 5 would be 2 x (14 + 2).
    assert of_pieces(batch, unpads=False, tokens=31) == [[2], [5], [0], [3], [1], [4]]
    assert of_pieces(batch, unpads=False, tokens=32) == [[2, 5], [0], [3], [1], [4]]
