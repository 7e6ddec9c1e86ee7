"""Noise in the embeddings of what is imitated."""

import copy
import functools
import re

import pytest
import torch

from lightning_rlhf import ConversationDataModule, SFTModule
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.noise import row_lengths
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.models.reading import first_with_prompt, padded, unpadded
from tests.networks import ENCODER_DECODERS, network, random_rows, tiny_gpt2, word_tokenizer, written
from tests.training import bare_trainer

ALPHA, WIDTH = 5.0, 16
without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PROMPT, RESPONSE = random_rows([3, 5], seed=1)


def policy_of(model):
    policy = Policy(Decoder(model)).train()
    policy.noise_alpha = ALPHA
    return policy


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_those_of_embeddings_with_noise(seed):
    model = network(tiny_gpt2(**without_dropout))
    plain, policy = copy.deepcopy(model), policy_of(model)
    torch.manual_seed(seed)
    logprobs = policy(written([PROMPT], [RESPONSE])).logprobs
    logprobs.sum().backward()

    torch.manual_seed(seed)
    tokens = torch.tensor([PROMPT + RESPONSE])
    embedded = plain.get_input_embeddings()(tokens[:, :-1])
    noise = (2.0 * torch.rand(1, 7, WIDTH) - 1.0) * ALPHA / (8 * WIDTH) ** 0.5
    logits = plain(inputs_embeds=embedded + noise).logits[0].log_softmax(-1)
    expected = torch.stack([logits[2 + t, token] for t, token in enumerate(RESPONSE)])
    expected.sum().backward()

    torch.testing.assert_close(logprobs[0], expected, rtol=0, atol=2e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-5)
    policy.noise_alpha = 0.0
    assert (policy(written([PROMPT], [RESPONSE])).logprobs - logprobs).abs().max() > 0.1


def test_noise_is_for_training_alone_and_leaves_nothing_behind():
    policy, batch = policy_of(network(tiny_gpt2(**without_dropout))), written([PROMPT], [RESPONSE])
    noisy = policy(batch).logprobs
    policy.eval()
    quiet = policy(batch).logprobs
    policy.train().noise_alpha = 0.0
    assert torch.equal(policy(batch).logprobs, quiet)
    assert not torch.equal(noisy, quiet)
    assert not policy.decoder.model.get_input_embeddings()._forward_hooks


PROMPTS = [[1, 2, 3], [1, 2, 3], [4], [5, 6]]
RESPONSES = random_rows([2, 6, 4, 1], seed=2)
LENGTHS = [5, 9, 5, 3]


def lengths_by_token(reading, batch):
    """Tokens in the order in which they are read, with the length of their row."""
    return list(zip(reading.tokens.flatten().tolist(), row_lengths(reading, batch).flatten().tolist(), strict=True))


def test_a_row_has_its_own_length_whatever_lies_beside_it():
    batch = written(PROMPTS, RESPONSES)
    side_by_side = padded(batch, None, True)
    assert row_lengths(side_by_side, batch).tolist() == [[length] * side_by_side.tokens.shape[1] for length in LENGTHS]
    in_line = lengths_by_token(unpadded(batch, None, first_with_prompt(batch, shares=False)), batch)
    rows = zip(PROMPTS, RESPONSES, LENGTHS, strict=True)
    assert in_line == [(token, n) for prompt, response, n in rows for token in prompt + response[:-1]]


def test_a_prompt_that_rows_share_has_the_length_of_the_longest():
    batch = written(PROMPTS, RESPONSES)
    found = lengths_by_token(unpadded(batch, None, first_with_prompt(batch, shares=True)), batch)
    expected = [(token, 9) for token in PROMPTS[0]]
    for i, prompt in enumerate([[], [], [4], [5, 6]]):
        expected += [(token, LENGTHS[i]) for token in prompt + RESPONSES[i][:-1]]
    assert found == expected


def test_a_line_that_is_filled_up_is_read_with_noise_too():
    model = network(tiny_gpt2(n_positions=400, **without_dropout))
    policy = policy_of(model)
    probe(policy.decoder)
    batch = written([[1]] * 2, random_rows([150, 130], seed=3))
    reading = unpadded(batch, None, [0, 1])
    assert reading.tokens.shape[1] % 32 == 0
    assert row_lengths(reading, batch).shape == reading.tokens.shape
    policy.decoder.block_size = 10**9  # of such blocks padding always costs more
    assert policy(batch).logprobs.isfinite().all()


def module_of(policy=None, **arguments):
    arguments = {"tokenizer": word_tokenizer(), "optimizer": functools.partial(torch.optim.SGD, lr=0.0), **arguments}
    return SFTModule(policy or network(tiny_gpt2(**without_dropout)), **arguments)


def run(**arguments):
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(module_of(**arguments), datamodule=ConversationDataModule(["a b c d"] * 2, validation=["b c d"]))
    return trainer.callback_metrics


def test_the_module_learns_with_noise_and_is_measured_without():
    noisy, plain = run(neftune_alpha=15.0), run()
    assert noisy["val/policy/loss"] == plain["val/policy/loss"]
    assert abs(noisy["policy/loss"] - plain["policy/loss"]) > 1e-2


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_a_noise_that_cannot_be_is_refused(alpha):
    with pytest.raises(ValueError, match=re.escape(f"`neftune_alpha={alpha}` must be finite, and not negative")):
        module_of(neftune_alpha=alpha)


def test_an_encoder_decoder_has_no_row_that_the_noise_is_for():
    module = module_of(network(ENCODER_DECODERS["t5"]()), neftune_alpha=5.0)
    with pytest.raises(ValueError, match="`neftune_alpha=5.0` adds noise .* T5ForConditionalGeneration reads apart"):
        module.configure_model()
