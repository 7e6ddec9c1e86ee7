"""Log-probs and values of responses: against plain forward passes, row by row, and blind to padding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_rlhf.batches import Rollouts
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.policy import Policy
from tests.networks import (
    ARCHITECTURES,
    MORE,
    PAD,
    POSITIONS,
    USUAL,
    VOCABULARY,
    bigram,
    network,
    random_rows,
    tiny_gpt2,
    written,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 0.0}
PROMPTS = random_rows([3, 9, 1, 6], seed=1)
RESPONSES = random_rows([5, 2, 7, 1], seed=2)


def policy_of(model: Any, temperature: float = 1.0, with_values: bool = True) -> Policy:
    torch.manual_seed(3)
    decoder = Decoder(model)
    return Policy(decoder, temperature, ValueHead(decoder.width) if with_values else None)


def wider(batch: Rollouts, left: int, right: int) -> Rollouts:
    """The same rows between more padding."""
    prompts, responses = (left, 0), (0, right)
    return Rollouts(
        prompt_tokens=nn.functional.pad(batch.prompt_tokens, prompts, value=PAD),
        prompt_mask=nn.functional.pad(batch.prompt_mask, prompts),
        prompts=batch.prompts,
        response_tokens=nn.functional.pad(batch.response_tokens, responses, value=PAD),
        response_mask=nn.functional.pad(batch.response_mask, responses),
        sampled_mask=nn.functional.pad(batch.sampled_mask, responses),
        old_logprobs=nn.functional.pad(batch.old_logprobs, responses),
        truncated=batch.truncated,
        responses=batch.responses,
    )


def flat(x: Tensor, mask: Tensor) -> Tensor:
    """What is real, response after response."""
    return torch.cat([row[row_mask] for row, row_mask in zip(x, mask, strict=True)])


def plain(policy: Policy, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and values response after response, from the model's own forward on unpadded text, token by token."""
    logprobs, values = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        states: list[Tensor] = []
        head = policy.decoder.model.get_output_embeddings()
        handle = head.register_forward_hook(lambda _, inputs, output, states=states: states.append(inputs[0][0]))
        logits = policy.decoder.model(input_ids=torch.tensor([prompt + response])).logits[0]
        handle.remove()
        for i, token in enumerate(response):
            before = len(prompt) + i - 1
            logprobs.append(torch.log_softmax(logits[before] / temperature, dim=0)[token])
            values.append(policy.value_head(states[0][None, before : before + 1])[0, 0])
    return torch.stack(logprobs), torch.stack(values)


def batched(policy: Policy, batch: Rollouts) -> tuple[Tensor, Tensor]:
    output = policy(batch)
    return flat(output.logprobs, batch.response_mask), flat(output.values, batch.response_mask)


def one_by_one(policy: Policy) -> tuple[Tensor, Tensor]:
    rows = [batched(policy, written([p], [r])) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def gradients(policy: Policy, logprobs: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Of a loss in which every token has a weight of its own."""
    weights = torch.randn(2, len(logprobs), generator=torch.Generator().manual_seed(4)) / len(logprobs)
    policy.zero_grad()
    (weights[0] * logprobs + weights[1] * values).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.invariant(1, 5, 14, 16)
@pytest.mark.parametrize("name", [*USUAL, *MORE, "openai_gpt", "mamba"])
def test_padding_changes_neither_logprobs_nor_values_nor_gradients(name: str) -> None:
    policy = policy_of(network(ARCHITECTURES[name]()), temperature=0.7)
    logprobs, values = plain(policy, temperature=0.7)
    expected = gradients(policy, logprobs, values)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01

    batch = written(PROMPTS, RESPONSES)
    for got in (batched(policy, batch), batched(policy, wider(batch, 4, 3)), one_by_one(policy)):
        assert_close(got, (logprobs, values), **CLOSE)
        assert_close(gradients(policy, *got), expected, **CLOSE)


@pytest.mark.invariant(1)
def test_prompts_of_one_length_need_no_left_padding_to_be_read_right() -> None:
    policy = policy_of(network(ARCHITECTURES["rwkv"]()))
    policy.decoder.pads = False
    prompts = random_rows([4, 4, 4], seed=5)
    responses = random_rows([2, 6, 3], seed=6)
    batch = written(prompts, responses)
    got = policy(batch).logprobs
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = policy.decoder.model(input_ids=torch.tensor([prompt + response])).logits[0]
        for t, token in enumerate(response):
            assert_close(got[i, t], torch.log_softmax(logits[len(prompt) + t - 1], dim=0)[token], **CLOSE)


@pytest.mark.invariant(1, 2)
@pytest.mark.parametrize("name", ["gpt2", "gptj", "opt", "bloom", "llama", "gemma2", "gpt_bigcode", "mamba"])
def test_rows_for_each_of_which_there_is_room_fit_side_by_side(name: str) -> None:
    policy = policy_of(network(ARCHITECTURES[name]()))
    prompts, responses = random_rows([POSITIONS - 4, 4], seed=5), random_rows([4, POSITIONS - 4], seed=6)
    together = flat(policy(written(prompts, responses)).logprobs, written(prompts, responses).response_mask)
    alone = [policy(written([p], [r])).logprobs[0] for p, r in zip(prompts, responses, strict=True)]
    assert_close(together, torch.cat(alone), **CLOSE)


def test_a_model_that_cannot_be_padded_refuses_prompts_of_different_lengths_by_name() -> None:
    policy = policy_of(network(ARCHITECTURES["rwkv"]()))
    policy.decoder.pads = False
    with pytest.raises(ValueError, match=r"`policy=RwkvForCausalLM` cannot be padded.*one length.*batch size of 1"):
        policy(written(PROMPTS, RESPONSES))


FOLLOWS = torch.tensor(
    [
        [0.1, 0.2, 0.3, 0.4],
        [0.4, 0.3, 0.2, 0.1],
        [0.25, 0.5, 0.125, 0.125],
        [0.7, 0.1, 0.1, 0.1],
    ]
)
WORTH = torch.tensor([10.0, 20.0, 30.0, 40.0])


class Worth(nn.Module):
    """The value of a state is that of the token before it; see :func:`bigram` for what states are."""

    def forward(self, states: Tensor) -> Tensor:
        return states[..., : len(WORTH)] @ WORTH / len(WORTH) ** 0.5


@pytest.mark.invariant(5)
def test_entry_t_belongs_to_response_token_t_and_is_read_before_it_by_hand() -> None:
    policy = Policy(Decoder(bigram(FOLLOWS)), 1.0, Worth())
    output = policy(written([[3, 1], [2]], [[0, 2, 1], [3, 0]], pad=3))
    # 1 -> 0 -> 2 -> 1, and 2 -> 3 -> 0.
    assert_close(output.logprobs[0].exp(), torch.tensor([0.4, 0.3, 0.5]), **CLOSE)
    assert_close(output.logprobs[1, :2].exp(), torch.tensor([0.125, 0.7]), **CLOSE)
    assert_close(output.values[0], torch.tensor([20.0, 10.0, 30.0]), rtol=1e-4, atol=0.0)
    assert_close(output.values[1, :2], torch.tensor([30.0, 40.0]), rtol=1e-4, atol=0.0)
    # After 2, of 1/4, 1/2 and twice 1/8, there are 1.75 bits to come.
    assert_close(output.entropy[1, 0] / torch.tensor(2.0).log(), torch.tensor(1.75), **CLOSE)


@pytest.mark.invariant(16)
def test_logprobs_are_those_of_logits_over_the_temperature_by_hand() -> None:
    policy = Policy(Decoder(bigram(FOLLOWS)), temperature=0.5)
    logprobs = policy(written([[2]], [[1, 3]], pad=3)).logprobs[0]
    # Half the temperature squares the odds: 16 to 64 to 4 to 4, then 16 to 9 to 4 to 1.
    assert_close(logprobs.exp(), torch.tensor([64 / 88, 1 / 30]), **CLOSE)


def test_without_a_value_head_there_are_no_values() -> None:
    policy = policy_of(network(tiny_gpt2()), with_values=False)
    assert policy(written(PROMPTS, RESPONSES)).values is None
    assert policy.next_token(torch.tensor([[1]]), torch.tensor([[True]]), None).values is None


@pytest.mark.invariant(8)
@pytest.mark.parametrize("name", [*USUAL, "mixtral", "mamba"])
@pytest.mark.parametrize("garbage", ["random", "out of range"])
def test_what_lies_in_the_padding_changes_nothing_bit_for_bit(name: str, garbage: str) -> None:
    policy = policy_of(network(ARCHITECTURES[name]()))
    clean = written(PROMPTS, RESPONSES)
    expected = batched(policy, clean)
    expected_gradients = gradients(policy, *expected)

    dirty = written(PROMPTS, RESPONSES)
    for tokens, mask in ((dirty.prompt_tokens, dirty.prompt_mask), (dirty.response_tokens, dirty.response_mask)):
        filling = torch.randint(VOCABULARY, tokens.shape) if garbage == "random" else torch.tensor(-100)
        tokens.copy_(torch.where(mask, tokens, filling))
    got = batched(policy, dirty)
    assert_close(got, expected, **EXACT)
    assert_close(gradients(policy, *got), expected_gradients, **EXACT)
    everything = policy(dirty)
    assert bool(everything.logprobs.isfinite().all() and everything.values.isfinite().all())


@pytest.mark.invariant(9)
@pytest.mark.parametrize("name", [*USUAL, *MORE])
def test_two_passes_over_the_same_rows_are_bit_equal(name: str) -> None:
    policy = policy_of(network(ARCHITECTURES[name]()))
    batch = written(PROMPTS, RESPONSES)
    first, second = policy(batch), policy(batch)
    with torch.no_grad():
        third = policy(batch)
    for other in (second, third):
        assert_close(other.logprobs, first.logprobs, **EXACT)
        assert_close(other.values, first.values, **EXACT)


@pytest.mark.invariant(15)
def test_logprobs_of_a_half_precision_model_are_single_precision_from_its_logits() -> None:
    model = network(tiny_gpt2()).bfloat16()
    policy = policy_of(model)
    batch = written(PROMPTS, RESPONSES)
    output = policy(batch)
    assert (output.logprobs.dtype, output.entropy.dtype, output.values.dtype) == (torch.float32,) * 3

    read: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, output: read.append(output.logits.detach()))
    policy(batch)
    handle.remove()
    assert read[0].dtype == torch.bfloat16
    expected = torch.log_softmax(read[0].float(), dim=-1)
    mask = batch.response_mask
    targets = batch.response_tokens[mask][None, :, None]
    assert_close(output.logprobs[mask], expected.gather(-1, targets)[0, :, 0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(output.logprobs, output.logprobs.bfloat16().float())
    output.logprobs.sum().backward()
    assert model.get_input_embeddings().weight.grad.dtype == torch.bfloat16


@pytest.mark.invariant(2, 16)
def test_the_next_token_is_told_from_left_padded_text_as_from_unpadded_text() -> None:
    policy = policy_of(network(tiny_gpt2()), temperature=0.5)
    tokens, mask = padded(PROMPTS, PAD, "left")
    step = policy.next_token(tokens, mask, None)
    for i, prompt in enumerate(PROMPTS):
        logits = policy.decoder.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        assert_close(step.logits[i], logits, **CLOSE)  # not divided: the sampler does that
        alone = policy.next_token(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool), None)
        assert_close(step.values[i], alone.values[0], **CLOSE)
