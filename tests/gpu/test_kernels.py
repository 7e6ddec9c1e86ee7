"""What is computed otherwise on a GPU: attention of rows in line, the head's tiles, recorded steps."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.batches import ResponseBatch
from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.functional import head
from lightning_rlhf.functional.head import head_logprobs
from lightning_rlhf.functional.logprobs import response_logprobs
from lightning_rlhf.generation.decode import DecodeLoop
from lightning_rlhf.generation.recorder import TRIED, Recorder
from lightning_rlhf.generation.sampling import Sampling
from lightning_rlhf.models import attention
from lightning_rlhf.models.activations import RMSNorm
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.vocabulary import SpecialTokens
from tests.networks import ARCHITECTURES, ENCODER_DECODERS, EOS, PAD, network, random_rows

PROMPTS = random_rows([3, 9, 1, 6, 5, 2, 8, 4], seed=1)
ENDS = SpecialTokens((EOS, 3, 7, 11), PAD)
LONG = Sampling(max_new_tokens=24)
RECORDED = ("gpt2", "gptj", "gpt_neox", "opt", "llama", "qwen3", "gemma", "phi", "gpt_bigcode")
IN_ONE_KERNEL = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma", "mistral", "phi")


def policy_of(name: str, unfrozen: int = -1) -> Policy:
    torch.manual_seed(3)
    decoder = decoder_of(network({**ARCHITECTURES, **ENCODER_DECODERS}[name](), spread=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a model cannot do
        probe(decoder)
    freeze(decoder, unfrozen)
    return Policy(decoder, 1.0, ValueHead(decoder.width)).eval().cuda()


def batch_of(shared: bool = False) -> ResponseBatch:
    prompts = [PROMPTS[i // 2 if shared else i] for i in range(8)]
    tokens, mask = padded(prompts, PAD, "left")
    responses, response_mask = padded(random_rows([7, 3, 11, 2, 5, 1, 4, 6], seed=2), PAD, "right")
    return ResponseBatch(
        prompt_tokens=tokens.cuda(),
        prompt_mask=mask.cuda(),
        response_tokens=responses.cuda(),
        response_mask=response_mask.cuda(),
    )


def said(policy: Policy, batch: ResponseBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and values in one row, and all gradients of a sum of them in another."""
    policy.zero_grad()
    output = policy(batch)
    mask = batch.response_mask
    weights = torch.linspace(-1.0, 2.0, int(mask.sum()), device="cuda")
    assert output.values is not None
    both = (output.logprobs[mask].float(), output.values[mask].float())
    sum(((weights * one).sum() for one in both), start=torch.zeros((), device="cuda")).backward()
    gradients = [p.grad.float().flatten() for p in policy.parameters() if p.grad is not None]
    return torch.cat(both).detach(), torch.cat(gradients)


@pytest.mark.invariant(1)
@pytest.mark.parametrize("shared", [False, True], ids=["each its prompt", "prompts are shared"])
@pytest.mark.parametrize("name", IN_ONE_KERNEL)
def test_rows_in_line_say_in_half_precision_what_padded_ones_say(name: str, shared: bool, monkeypatch: Any) -> None:
    policy, batch = policy_of(name), batch_of(shared)
    policy.decoder.shares = True
    exact, exact_gradients = said(policy, batch)  # padded, in single precision
    assert policy.decoder.line(batch) is None
    calls: list[int] = []
    kernel = attention._packed
    monkeypatch.setattr(attention, "_packed", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    with torch.autocast("cuda", torch.bfloat16):
        first = policy.decoder.line(batch)
        assert first is not None
        assert (len(set(first)) == 4) == shared
        in_line, gradients = said(policy, batch)
        assert len(calls) == policy.decoder.model.config.num_hidden_layers
        monkeypatch.setattr(attention, "packs", lambda *_: False)
        monkeypatch.setattr("lightning_rlhf.models.decoder.packs", lambda *_: False)
        beside, beside_gradients = said(policy, batch)
    assert len(calls) == policy.decoder.model.config.num_hidden_layers

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    # Both round, each in its own way; neither is further from the truth than rounding makes the other.
    assert error(in_line, exact) < max(1.5 * error(beside, exact), 0.01)
    assert error(gradients, exact_gradients) < max(1.5 * error(beside_gradients, exact_gradients), 0.02)


def test_a_window_is_seen_through_in_line_too() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 16, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    mask = torch.tensor([[[[9, -1], [14, 0], [0, -1], [17, -1]]]])
    for window in (None, 5):
        found, _ = attention.rows_attention(module, q, k, v, mask, scaling=0.3, sliding_window=window)
        expected, _ = attention.rows_attention(
            module, *(x.float() for x in (q, k, v)), mask, scaling=0.3, sliding_window=window
        )
        assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "t5", "bart"])
def test_recorded_steps_write_what_others_write(name: str) -> None:
    policy, recorder = policy_of(name), Recorder()
    prompts = PROMPTS if policy.decoder.pads else random_rows([5] * 8, seed=1)
    tokens, mask = (tensor.cuda() for tensor in padded(prompts, PAD, "left"))
    for number in range(3):
        uniforms = row_uniforms(number, "rollout", (), range(8), LONG.max_new_tokens)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name not in RECORDED else "error")
            found, expected = (
                DecodeLoop(policy, LONG, ENDS, with_final_values=True, recorder=which)(tokens, mask, uniforms)
                for which in (recorder, None)
            )
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.mask, expected.mask)
        for kind in ("logprobs", "values", "final_values"):
            assert_close(getattr(found, kind), getattr(expected, kind), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(0.97)  # as an update does: what was recorded sees it
    if name in RECORDED:
        assert recorder.trials == TRIED
        assert not recorder.is_refused
        assert len(recorder._graphs) > 1


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_recorded_groups_keep_their_trunk(group_size: int, precision: torch.dtype | None) -> None:
    policy, recorder = policy_of("llama", unfrozen=1), Recorder()
    tokens, mask = (tensor.cuda() for tensor in padded(PROMPTS, PAD, "left"))
    how: dict[str, Any] = {"with_final_values": True, "trunk_bytes": 2**20}
    close = {"rtol": 1e-4, "atol": 1e-4} if precision is None else {"rtol": 0.1, "atol": 0.1}
    for number in range(2):
        uniforms = row_uniforms(number, "rollout", (), range(8 * group_size), LONG.max_new_tokens)
        with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
            found, expected = (
                DecodeLoop(policy, LONG, ENDS, recorder=which, **how)(tokens, mask, uniforms, group_size)
                for which in (recorder, None)
            )
        agree = (found.tokens == expected.tokens).all(1) if found.tokens.shape == expected.tokens.shape else None
        assert agree is not None
        assert agree.float().mean() > (0.99 if precision is None else 0.5)
        for kind in ("logprobs", "values"):
            assert_close(getattr(found, kind)[agree], getattr(expected, kind)[agree], **close)
        is_real = torch.cat([mask.repeat_interleave(group_size, 0), expected.mask[:, 1:]], dim=1)
        is_real &= agree[:, None]
        assert_close(found.trunk[is_real].float(), expected.trunk[is_real].float(), **close)
    assert recorder.trials == TRIED
    assert not recorder.is_refused


@pytest.mark.invariant(5, 30)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [600, 2**26])
def test_the_heads_tiles_say_what_logits_say(dtype: torch.dtype, tile: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "GPU_TILE", tile)
    monkeypatch.setattr(head, "NARROWEST", 16)
    torch.manual_seed(0)
    states, weight = (torch.randn(n, 32, dtype=torch.float64) for n in (60, 101))
    tokens, scale = torch.randint(101, (60,)), torch.linspace(-1.0, 2.0, 60)

    def outcome(states: torch.Tensor, weight: torch.Tensor, by: Any) -> list[torch.Tensor]:
        states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
        logprobs, entropy = by(states, weight)
        (scale.to(logprobs) * (logprobs + 0.3 * entropy)).sum().backward()
        return [x.detach().cpu().double() for x in (logprobs, entropy, states.grad, weight.grad)]

    exact = outcome(states, weight, lambda s, w: response_logprobs(s @ w.T, tokens, 0.7))
    found = outcome(
        states.to(dtype).cuda(), weight.to(dtype).cuda(), lambda s, w: head_logprobs(s, w, None, tokens.cuda(), 0.7)
    )
    for mine, theirs in zip(found, exact, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_copies_of_rows_go_where_their_batch_is() -> None:
    batch = batch_of()
    assert replace(batch).select(torch.tensor([1, 2])).response_tokens.is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_by_one_operator_is_the_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64))
    states = torch.randn(5, 7, 64)
    exact = RMSNorm(weight, 1e-6)(states)
    (exact.sin().sum()).backward()
    expected, weight.grad = weight.grad, None
    norm = RMSNorm(torch.nn.Parameter(weight.detach().cuda()), 1e-6)
    found = norm(states.cuda().to(dtype))
    assert found.dtype == torch.float32, "the wider of the two, as transformers has it"
    found.sin().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    assert_close(found.cpu(), exact, **close)
    assert_close(norm.weight.grad.cpu(), expected, **(close if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}))


def test_what_validation_asked_for_first_can_be_learnt_from() -> None:
    policy, batch = policy_of("llama"), batch_of()
    attention._packing.cache_clear()
    with torch.autocast("cuda", torch.bfloat16):
        with torch.inference_mode():
            policy(batch)
        said(policy, batch)
