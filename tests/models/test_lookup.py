"""The gradient of an embedding that is the head too: the same, made of the rows that were read."""

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.batches import ResponseBatch
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.models import decoder as decoders
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.lookup import _Lookup, sparse_lookup
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
    layouts: list[torch.layout] = []
    backward = _Lookup.backward
    monkeypatch.setattr(
        _Lookup, "backward", staticmethod(lambda *args: layouts.append((out := backward(*args))[0].layout) or out)
    )
    found = gradients(policy, losses)
    expected_layouts = [torch.strided if loss is values else torch.sparse_coo for loss in losses]
    assert layouts == expected_layouts, "with the head's gradient a sparse one, and alone a dense one"
    assert all(gradient.layout == torch.strided for gradient in found)
    monkeypatch.setattr(decoders, "sparse_lookup", lambda *_: decoders.nullcontext())
    expected = gradients(policy, losses)
    assert len(layouts) == len(losses)
    assert len(found) == len(expected) > 2
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, **CLOSE)


def test_what_fills_rows_up_has_no_gradient() -> None:
    embedding = torch.nn.Embedding(5, 3, padding_idx=2)
    tokens = torch.tensor([[1, 2, 4, 1]])
    for is_learnt in (False, True):
        with sparse_lookup(embedding, embedding) as learnt:
            assert learnt is not None
            learnt.head = is_learnt
            looked_up = embedding(tokens)
        (gradient,) = torch.autograd.grad((looked_up * torch.arange(4.0)[None, :, None]).sum(), embedding.weight)
        assert gradient.is_sparse == is_learnt
        # Row 1 is read with 0 and 3, row 2 fills up, row 4 is read with 2.
        assert_close(gradient.to_dense()[:, 0], torch.tensor([0.0, 3.0, 0.0, 0.0, 2.0]))


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
        with sparse_lookup(given, its_head) as learnt:
            assert learnt is None
    with torch.no_grad(), sparse_lookup(embedding, embedding) as learnt:
        assert learnt is None


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
