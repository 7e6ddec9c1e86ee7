import functools

import pytest
import torch

from lightning_rlhf import PPOModule
from tests.learning import enumerable


def test_ppo_learns_to_write_the_token_that_pays():
    def count(prompts, responses):
        return [response.split().count("b") for response in responses]

    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    _, after = enumerable.train(PPOModule, count, iterations=15, batch_size=64, optimizer=optimizer, kl_coef=0.0)
    best = enumerable.RESPONSES.index((2, 2, 2))
    assert after.exp()[best] > 0.9


@pytest.mark.invariant(35)
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_ppo_converges_to_the_optimum_of_kl_regularised_rl(beta):
    table = enumerable.Table(seed=3)
    before, after = enumerable.train(
        PPOModule,
        table.score,
        iterations=40,
        batch_size=512,
        kl_coef=beta,
        reward_clip=None,
        whiten_advantages=False,
        value_clip_range=None,
        minibatch_size=256,
        lr_scheduler="linear",
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
        seed=0,
    )
    optimum = table.optimum(before, beta)
    assert before.exp().sum() == pytest.approx(1.0, abs=1e-6)  # nothing was left out
    assert enumerable.divergence(before, optimum) > 0.5
    assert enumerable.divergence(after, optimum) < 0.01
