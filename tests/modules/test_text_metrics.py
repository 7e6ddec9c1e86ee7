"""Perplexity and token accuracy: by hand, beside torchmetrics' own, and as a module logs them."""

import functools
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torchmetrics.text import Perplexity as OnLogits

from lightning_rlhf import ConversationDataModule, SFTModule
from lightning_rlhf.models.decoder import Decoder
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from lightning_rlhf.modules.text_metrics import Perplexity, TokenAccuracy
from tests.networks import ARCHITECTURES, bigram, network, random_rows, tiny_gpt2, word_tokenizer, written
from tests.training import bare_trainer


@pytest.mark.invariant(40)
def test_perplexity_is_that_of_all_tokens_and_not_a_mean_of_means():
    metric = Perplexity()
    metric.update(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[True, True]]))
    metric.update(torch.tensor([[0.125, float("nan")]]).log(), torch.tensor([[True, False]]))
    assert float(metric.compute()) == pytest.approx((2 * 4 * 8) ** (1 / 3), rel=1e-7)


def test_perplexity_is_what_torchmetrics_makes_of_logits():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    mask = torch.rand(3, 5) < 0.6
    other, ours = OnLogits(ignore_index=-100), Perplexity()
    other.update(logits, torch.where(mask, tokens, -100))
    ours.update(logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2), mask)
    assert float(ours.compute()) == pytest.approx(float(other.compute()), rel=1e-5)


def test_accuracy_is_the_share_of_tokens_that_are_the_likeliest():
    metric = TokenAccuracy()
    metric.update(torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]]))
    metric.update(torch.tensor([[True, True]]), torch.tensor([[True, True]]))
    assert float(metric.compute()) == 0.75


@pytest.mark.parametrize("unpads", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gptj"])  # gemma2 caps its logits, gptj's head has a bias
def test_what_is_the_likeliest_is_what_the_model_says(name, unpads):
    model = network(ARCHITECTURES[name]())
    policy = Policy(Decoder(model)).eval()
    probe(policy.decoder)
    if not unpads:
        policy.decoder.unpads = False
    else:
        policy.decoder.block_size = 10**9  # of such blocks padding always costs more
    prompts, responses = random_rows([3, 1, 4], seed=4), random_rows([5, 2, 6], seed=5)
    for row, prompt in zip(responses, prompts, strict=True):  # some tokens are to be the likeliest
        logits = model(input_ids=torch.tensor([prompt + row])).logits[0]
        row[0] = int(logits[len(prompt) - 1].argmax())
    batch = written(prompts, responses)
    logprobs, is_likeliest = policy.measured(batch)
    torch.testing.assert_close(logprobs, policy(batch).logprobs, rtol=0, atol=1e-6)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert is_likeliest[i, : len(response)].tolist() == (logits.argmax(-1) == torch.tensor(response)).tolist()
    assert is_likeliest[:, 0].all()
    assert not is_likeliest[~batch.response_mask].any()


def test_a_module_logs_both_of_every_loader():
    # After a comes b, by three of four; else c. Nothing else is said.
    table = torch.full((24, 24), 1 / 24)
    table[0] = 0.0
    table[0, 1], table[0, 2] = 0.75, 0.25
    table[1], table[2] = 0.0, 0.0
    table[1, 22] = table[2, 22] = 1.0
    module = SFTModule(bigram(table), tokenizer=word_tokenizer())
    data = ConversationDataModule(validation=["a b", "a b", "a c"], test=["a c"], batch_size=2)
    trainer = bare_trainer()
    trainer.validate(module, datamodule=data, verbose=False)
    expected = math.exp(-(2 * math.log(0.75) + math.log(0.25)) / 6)
    assert float(trainer.callback_metrics["val/policy/perplexity"]) == pytest.approx(expected, rel=2e-4)
    assert float(trainer.callback_metrics["val/policy/token_accuracy"]) == pytest.approx(5 / 6, rel=1e-6)
    trainer.test(module, datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["test/policy/perplexity"]) == pytest.approx(2.0, rel=2e-4)
    assert float(trainer.callback_metrics["test/policy/token_accuracy"]) == 0.5


def test_an_evaluation_that_was_broken_off_leaves_nothing_behind():
    class Breaking(Callback):
        def on_validation_batch_end(self, *args):
            raise KeyError

    def measured(module, rows, *callbacks):
        data = ConversationDataModule(validation=rows)
        return bare_trainer(callbacks=list(callbacks)).validate(module, datamodule=data, verbose=False)

    module = SFTModule(network(tiny_gpt2()), tokenizer=word_tokenizer())
    with pytest.raises(KeyError):
        measured(module, ["a b c d e"], Breaking())
    assert measured(module, ["b c"]) == measured(SFTModule(network(tiny_gpt2()), tokenizer=word_tokenizer()), ["b c"])


def test_what_others_say_in_a_conversation_is_neither_learnt_nor_measured():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    )
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, ["a", "b", "t", "d"], strict=True)]
    rows = [{"messages": messages}]

    def losses():
        optimizer = functools.partial(torch.optim.SGD, lr=0.0)
        module = SFTModule(network(tiny_gpt2()), tokenizer=tokenizer, disable_dropout=True, optimizer=optimizer)
        trainer = bare_trainer(max_epochs=1)
        trainer.fit(module, datamodule=ConversationDataModule(rows, validation=rows))
        return [float(trainer.callback_metrics[name]) for name in ("policy/loss", "val/policy/loss")]

    model, ids = network(tiny_gpt2()), [0, 1, 22, 19, 3, 22]
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -sum(float(logprobs[t - 1, ids[t]].detach()) for t in (1, 2, 4, 5)) / 4
    assert losses() == pytest.approx([expected] * 2, abs=1e-5)
