import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_rlhf import ConversationDataModule, SFTModule
from lightning_rlhf.models.reference import fingerprint
from tests.networks import EOS, network, tiny_gpt2, word_tokenizer
from tests.training import bare_trainer, weights

# Ten rows of uneven length; every window of six but the last, which has four.
ROWS = [
    {"prompt": "a b", "response": "c d e f g h"},
    {"prompt": "c", "response": "d"},
    "b c d e f",
    {"prompt": "a a a a a", "response": ""},
    "t s r q p o n m l k",
    {"prompt": "f", "response": "f f f"},
    "g h",
    {"prompt": "m n o", "response": "a b c d e f g h i j k l"},
    {"prompt": "u", "response": "v"},
    "k",
]
WINDOW = 6
without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Watch(Callback):
    """Keeps what is logged and the rate that each update was made with."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args):
        if "policy/loss" in trainer.callback_metrics and len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["policy/loss"]))


def module_of(policy=None, **arguments):
    arguments = {"tokenizer": word_tokenizer(), "optimizer": sgd, "seed": 0, **arguments}
    return SFTModule(policy or network(tiny_gpt2(**without_dropout)), **arguments)


def fit(module, batch_size=WINDOW, rows=ROWS, shuffle=False, ckpt_path=None, **flags):
    watch = Watch()
    data = ConversationDataModule(rows, batch_size=batch_size, shuffle=shuffle, seed=0)
    callbacks = [*flags.pop("callbacks", []), watch]
    bare_trainer(**{"max_epochs": 2, "callbacks": callbacks, **flags}).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return watch


def by_hand(model, clip=None, epochs=2):
    """Plain torch on whole windows, one row after the other and nothing padded."""
    vocabulary = word_tokenizer().get_vocab()
    optimizer = sgd(model.parameters())
    losses = []
    for start in [*range(0, len(ROWS), WINDOW)] * epochs:
        total, count = torch.zeros(()), 0
        for row in ROWS[start : start + WINDOW]:
            words = row.split() if isinstance(row, str) else row["prompt"].split() + row["response"].split()
            given = 1 if isinstance(row, str) else len(row["prompt"].split())
            ids = torch.tensor([vocabulary[word] for word in words] + [EOS])
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            for t in range(given, len(ids)):
                total, count = total - logprobs[t - 1, ids[t]], count + 1
        optimizer.zero_grad()
        (total / count).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(total.detach() / count))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), losses


@pytest.fixture(scope="module")
def expected():
    """Weights and losses by hand, without clipping and with it."""
    model = network(tiny_gpt2(**without_dropout))
    return {clip: by_hand(copy.deepcopy(model), clip) for clip in (None, 0.5)}


@pytest.mark.invariant(30)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(6, 1), (3, 2), (2, 3), (1, 6)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_no_split_into_batches_changes_weights_or_losses(expected, batch_size, accumulate, clip):
    module = module_of()
    watch = fit(module, batch_size, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    of_hand, losses = expected[clip]
    torch.testing.assert_close(weights(module), of_hand, rtol=0, atol=1e-6)
    assert watch.losses == pytest.approx(losses, abs=2e-6)
    assert (expected[None][0] - expected[0.5][0]).abs().max() > 1e-3  # or clipping was not tried


@pytest.mark.invariant(1, 30)
def test_batches_by_tokens_learn_what_whole_batches_learn():
    # All rows in one batch, or two rows at most in each of ten, whose gradients are added up.
    whole, parts = module_of(), module_of()
    fit(whole, batch_size=10)
    data = ConversationDataModule(ROWS, batch_tokens=16, shuffle=False)
    data.tokenizer = word_tokenizer()
    count = len(data.train_dataloader())
    assert 4 < count < 10
    bare_trainer(max_epochs=2, accumulate_grad_batches=count).fit(parts, datamodule=data)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.invariant(40)
def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_step():
    # Without learning: a row alone, the other alone, and both together.
    rows = [ROWS[1], ROWS[7]]
    losses = [
        fit(module_of(optimizer=functools.partial(torch.optim.SGD, lr=0.0)), rows=some, max_epochs=1).losses[0]
        for some in (rows[:1], rows[1:], rows)
    ]
    assert losses[2] == pytest.approx((2 * losses[0] + 13 * losses[1]) / 15, abs=1e-6)
    assert abs(losses[0] - losses[1]) > 0.1


def test_it_learns_to_write_what_it_read():
    module = module_of(tiny_gpt2(layers=1, width=32), optimizer=functools.partial(torch.optim.AdamW, lr=1e-2))
    rows = [{"prompt": "a", "response": "f e d"}, {"prompt": "b", "response": "g"}, "c h h i"]
    watch = fit(module, rows=rows, max_epochs=60, batch_size=3)
    assert watch.losses[-1] < 0.1 < 2.5 < watch.losses[0]
    assert module.generate(["a", "b", "c"], {"temperature": 0, "max_new_tokens": 8}) == ["f e d", "g", "h h i"]


def test_dropout_is_on_unless_it_is_switched_off():
    noisy, quiet, quieter = (
        fit(module, max_epochs=1).losses
        for module in (
            module_of(network(tiny_gpt2())),
            module_of(network(tiny_gpt2()), disable_dropout=True),
            module_of(network(tiny_gpt2(**without_dropout))),
        )
    )
    assert quiet == quieter
    assert abs(noisy[0] - quiet[0]) > 1e-3


@pytest.mark.invariant(36)
def test_a_run_with_dropout_can_be_repeated_whatever_was_drawn_before():
    one, same, other = (module_of(network(tiny_gpt2()), seed=seed) for seed in (1, 1, 2))
    fit(one)
    torch.rand(5)
    fit(same)
    fit(other)
    assert fingerprint(one.policy) == fingerprint(same.policy) != fingerprint(other.policy)


def test_the_noise_of_every_batch_is_its_own():
    # The same row over and over, without learning: only the noise differs.
    module = module_of(network(tiny_gpt2()), optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    losses = fit(module, rows=["a b c d"] * 6, batch_size=1, max_epochs=2).losses
    assert len(set(losses)) == 12
    module = module_of(network(tiny_gpt2()), optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    rows = ["a b c d"] * 2
    (both,) = fit(module, rows=rows, batch_size=1, accumulate_grad_batches=2, max_epochs=1).losses
    assert abs(both - losses[0]) > 1e-6


@pytest.mark.invariant(36)
@pytest.mark.parametrize(("step", "alpha"), [(2, 0.0), (5, 0.0), (8, 0.0), (5, 5.0)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, step, alpha):
    arguments = {"neftune_alpha": alpha, "optimizer": None, "lr_scheduler": "cosine", "warmup_updates": 3}

    def run(ckpt_path=None):
        keep = ModelCheckpoint(
            tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
        )
        module = module_of(network(tiny_gpt2()), **arguments)
        flags = {"callbacks": [keep], "enable_checkpointing": True, "max_epochs": 2, "accumulate_grad_batches": 1}
        return module, fit(module, batch_size=2, shuffle=True, ckpt_path=ckpt_path, **flags)

    whole, watch = run()
    resumed, rest = run(tmp_path / f"step={step}.ckpt")
    assert rest.rates == watch.rates[step:]
    assert rest.losses == watch.losses[step:]
    assert fingerprint(resumed.policy) == fingerprint(whole.policy)


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 4, "max_epochs": -1}])
def test_the_rate_falls_over_the_updates_that_are_planned(limit):
    module = module_of(lr_scheduler="linear", warmup_updates=2)
    watch = fit(module, batch_size=2, accumulate_grad_batches=3, **limit)
    assert watch.rates == pytest.approx([0.05 * 1.0, 0.1 * 0.75, 0.1 * 0.5, 0.1 * 0.25], abs=1e-12)


def test_everything_of_the_policy_trains_and_there_is_no_value_head():
    module = module_of()
    module.configure_model()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    assert not any("value" in name for name in start)
    fit(module)
    still = [name for name, parameter in module.named_parameters() if torch.equal(parameter, start[name])]
    assert still == []


def test_a_batch_in_which_nothing_is_learnt_moves_nothing():
    class Nothing(ConversationDataModule):
        def collate(self, items):
            batch = super().collate(items)
            batch.response_mask = torch.zeros_like(batch.response_mask)
            return batch

    module = module_of(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    module.configure_model()
    before = fingerprint(module.policy)
    bare_trainer(max_epochs=1).fit(module, datamodule=Nothing(ROWS))
    assert fingerprint(module.policy) == before
