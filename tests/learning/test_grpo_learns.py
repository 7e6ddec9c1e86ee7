import functools

import pytest
import torch

from lightning_rlhf import GRPOModule
from tests.learning import enumerable

adamw = functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)


def test_grpo_learns_to_write_the_token_that_pays():
    def count(prompts, responses):
        return [response.split().count("b") for response in responses]

    _, after = enumerable.train(
        GRPOModule, count, iterations=15, batch_size=8, num_epochs=4, optimizer=adamw, kl_coef=0.0
    )
    best = enumerable.RESPONSES.index((2, 2, 2))
    assert after.exp()[best] > 0.9


def distances(kl_in, beta, iterations=40, **arguments):
    """KL to the optimum of KL-regularised RL, before and after."""
    table = enumerable.Table(seed=3)
    before, after = enumerable.train(
        GRPOModule,
        table.score,
        iterations=iterations,
        batch_size=8,
        group_size=64,
        kl_coef=beta,
        kl_in=kl_in,
        divide_by_std=False,
        averaging="length",
        reward_clip=None,
        num_epochs=4,
        minibatch_size=256,
        lr_scheduler="linear",
        optimizer=adamw,
        seed=0,
        **arguments,
    )
    optimum = table.optimum(before, beta)
    return enumerable.divergence(before, optimum), enumerable.divergence(after, optimum)


@pytest.mark.invariant(35)
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_grpo_converges_to_the_optimum_of_kl_regularised_rl(beta):
    # With half as many iterations, what is left of the noise of sampling depends on the seed: 0.003 to 0.03.
    start, end = distances("reward", beta, iterations=80)
    assert start > 0.5
    assert end < 0.01


@pytest.mark.invariant(21, 35)
def test_the_divergence_in_the_loss_has_another_optimum():
    start, end = distances("loss", 0.2, iterations=20)  # which comes within 0.02 with the divergence in the reward
    assert start > 0.5
    assert end > 0.3
