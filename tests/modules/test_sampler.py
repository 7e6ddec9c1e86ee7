"""Log-probs computed anew, and weights that make up for a sampler that rounds differently."""

import dataclasses

import pytest
import torch

from lightning_rlhf import GRPOModule, PPOModule
from lightning_rlhf.modules.report import Report
from lightning_rlhf.modules.sampler import SamplerCorrection
from tests.networks import tiny_gpt2, written
from tests.training import fit, module_of, weights


class Misled:
    """A sampler whose log-probs are off by what it is told."""

    def __init__(self, module, gap):
        self.rollout, self.gap = module.rollout, gap
        module.rollout = self

    def __call__(self, prompts):
        rollouts = self.rollout(prompts)
        return dataclasses.replace(rollouts, old_logprobs=rollouts.old_logprobs + self.gap * rollouts.sampled_mask)


def test_weights_are_ratios_cut_off_by_hand():
    rollouts = written([[1], [2]], [[3, 4], [5]])
    rollouts.old_logprobs = torch.tensor([[-1.0, -3.0], [-2.0, 7.0]])
    anew = torch.tensor([[-1.5, -1.0], [-2.0, 0.0]])
    report = Report()
    SamplerCorrection(True, 2.0)(rollouts, anew, report)
    e = torch.e
    torch.testing.assert_close(rollouts.importance, torch.tensor([[e**-0.5, 2.0], [1.0, 1.0]]))
    torch.testing.assert_close(rollouts.old_logprobs, torch.tensor([[-1.5, -1.0], [-2.0, 7.0]]))


@pytest.mark.invariant(9)
@pytest.mark.parametrize("cls", [PPOModule, GRPOModule])
def test_ratios_begin_at_one_whatever_the_sampler_says_and_the_gap_is_logged(cls):
    still = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0), "num_epochs": 2}
    module = module_of(cls, recompute_logprobs=True, **still)
    Misled(module, 0.3)
    metrics = fit(module, iterations=1).metrics[-1]
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/sampler_gap"] == pytest.approx(0.3, abs=1e-5)
    assert "policy/importance" not in metrics


@pytest.mark.parametrize(("gap", "weight"), [(0.3, 2.718281828**-0.3), (-0.3, 2.718281828**0.3), (-3.0, 2.0)])
def test_every_token_counts_its_weight(gap, weight):
    # A gradient that is not clipped, times the weight, is a step of SGD times the weight.
    arguments = {"num_epochs": 1, "minibatch_size": 100, "max_grad_norm": None, "kl_coef": 0.0, "group_size": 2}
    policy = tiny_gpt2(initializer_range=0.3)
    plain, weighed = (
        module_of(GRPOModule, policy, **arguments, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5), **more)
        for more in ({}, {"recompute_logprobs": True, "importance_cap": 2.0})
    )
    Misled(weighed, gap)
    moved = []
    for module in (plain, weighed):
        module.configure_model()
        before = weights(module)
        metrics = fit(module, iterations=1).metrics[-1]
        moved.append(weights(module) - before)
    assert metrics["policy/importance"] == pytest.approx(weight, abs=1e-5)
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[1], weight * moved[0], rtol=1e-4, atol=1e-6)


@pytest.mark.invariant(30)
def test_no_split_changes_what_is_computed_anew():
    results = []
    for split in ({}, {"micro_batch_size": 1}, {"micro_batch_tokens": 9}):
        module = module_of(PPOModule, recompute_logprobs=True, importance_cap=2.0, **split)
        fit(module)
        results.append(weights(module))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)
