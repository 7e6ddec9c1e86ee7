"""The gradient of an embedding that is the head too: the same, made of the rows that were read."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from lightning_rlhf.batches import ResponseBatch
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.models import decoder as decoders
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.lookup import _Tied, sparse_lookup
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from tests.networks import ARCHITECTURES, PAD, network, random_rows

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def batch_of() -> ResponseBatch:
    prompts, responses = random_rows([3, 5, 2, 4], seed=1), random_rows([6, 2, 4, 3], seed=2)
    (tokens, mask), (written, is_written) = padded(prompts, PAD, "left"), padded(responses, PAD, "right")
    return ResponseBatch(prompt_tokens=tokens, prompt_mask=mask, response_tokens=written, response_mask=is_written)


def policy_of(name: str, **config) -> Policy:
    decoder = decoder_of(network(ARCHITECTURES[name](**config), spread=1.0))
    probe(decoder)
    return Policy(decoder, 1.0, ValueHead(decoder.width)).eval()


def gradients(policy: Policy, losses) -> list[torch.Tensor]:
    policy.zero_grad()
    for loss in losses:
        loss(policy).backward()
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


def logprobs(policy: Policy) -> torch.Tensor:
    return policy(batch_of()).logprobs.sum()


def values(policy: Policy) -> torch.Tensor:
    return policy(batch_of()).values.sum()


def both(policy: Policy) -> torch.Tensor:
    output = policy(batch_of())
    return output.logprobs.sum() + 0.3 * output.values.sum()


@pytest.mark.parametrize("losses", [(logprobs,), (values,), (both,), (both, both), (values, logprobs, values)])
@pytest.mark.parametrize(("name", "config"), [("gpt2", {}), ("llama", {"tie_word_embeddings": True}), ("opt", {})])
def test_gradients_are_those_of_an_ordinary_lookup(name, config, losses, monkeypatch) -> None:
    policy = policy_of(name, **config)
    embedding = policy.decoder.model.get_input_embeddings()
    assert embedding.weight is policy.decoder.model.get_output_embeddings().weight
    met: list[tuple[bool, bool]] = []
    backward = _Tied.backward

    def watched(ctx, of_head, of_rows):
        met.append((of_head is not None, of_rows.is_sparse))
        return backward(ctx, of_head, of_rows)

    monkeypatch.setattr(_Tied, "backward", staticmethod(watched))
    found = gradients(policy, losses)
    assert met == [(loss is not values, True) for loss in losses]
    assert all(gradient.layout == torch.strided for gradient in found)
    monkeypatch.setattr(decoders, "sparse_lookup", lambda *_: decoders.nullcontext())
    expected = gradients(policy, losses)
    assert len(met) == len(losses)
    assert len(found) == len(expected) > 2
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, **CLOSE)


def test_several_passes_before_one_backward_pass(monkeypatch) -> None:
    policy = policy_of("gpt2")

    def twice(policy: Policy) -> torch.Tensor:
        return both(policy) - 0.7 * policy(batch_of()).logprobs[:2].sum() + 0.2 * values(policy)

    found = gradients(policy, (twice,))
    monkeypatch.setattr(decoders, "sparse_lookup", lambda *_: decoders.nullcontext())
    for mine, theirs in zip(found, gradients(policy, (twice,)), strict=True):
        assert_close(mine, theirs, **CLOSE)


def test_a_gradient_of_the_head_is_not_copied() -> None:
    policy = policy_of("gpt2")
    (weight,) = {policy.decoder.model.get_input_embeddings().weight}
    both(policy).backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        policy.zero_grad()
        both(policy).backward()
    shapes = {event.name: event.input_shapes for event in seen.events() if list(weight.shape) in event.input_shapes}
    assert "aten::index_add_" in shapes
    assert not {"aten::copy_", "aten::clone", "aten::add", "aten::add_"} & set(shapes)


def test_what_fills_rows_up_has_no_gradient() -> None:
    embedding = torch.nn.Embedding(5, 3, padding_idx=2)
    tokens = torch.tensor([[1, 2, 4, 1]])
    for is_learnt in (False, True):
        with sparse_lookup(embedding, embedding) as weight:
            assert weight is not None
            loss = (embedding(tokens) * torch.arange(4.0)[None, :, None]).sum() + (
                weight * torch.full((5, 3), 0.5 * is_learnt)
            ).sum()
        (gradient,) = torch.autograd.grad(loss, embedding.weight)
        # Row 1 is read with 0 and 3, row 2 fills up, row 4 is read with 2.
        assert_close(gradient[:, 0], torch.tensor([0.0, 3.0, 0.0, 0.0, 2.0]) + 0.5 * is_learnt)


def test_it_is_left_alone_where_it_would_not_help() -> None:
    embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    cases = [(embedding, head)]
    head_of_its_own = torch.nn.Embedding(5, 3)
    cases.append((head_of_its_own.requires_grad_(False), head_of_its_own))

    class Scaled(torch.nn.Embedding):
        """As Gemma's."""

    scaled = Scaled(5, 3)
    cases.append((scaled, scaled))
    for given, its_head in cases:
        with sparse_lookup(given, its_head) as weight:
            assert weight is None
    with torch.no_grad(), sparse_lookup(embedding, embedding) as weight:
        assert weight is None


def test_what_one_backward_pass_has_come_to_another_has_not() -> None:
    policy = policy_of("gpt2")
    output = policy(batch_of())
    output.logprobs.sum().backward(retain_graph=True)
    policy.zero_grad()
    output.values.sum().backward()  # through the same pass, and not through the head
    gradient = policy.decoder.model.get_input_embeddings().weight.grad
    assert gradient.layout == torch.strided
    (expected,) = gradients(policy, (values,))[:1]
    assert_close(gradient, expected, **CLOSE)
