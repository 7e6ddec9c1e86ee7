import functools

import pytest
import torch

from lightning_rlhf import GRPOModule
from lightning_rlhf.models.reference import fingerprint
from tests.networks import network, tiny_gpt2
from tests.training import PROMPTS, fit, module_of, sgd, share_of_early_letters, weights

GROUP = 4


def grpo(**arguments):
    return module_of(GRPOModule, **{"group_size": GROUP, "minibatch_size": 8, **arguments})


def still(**arguments):
    """A module that does not move."""
    return grpo(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), **arguments)


def scores_of(experience):
    return torch.tensor(share_of_early_letters(experience.prompts, experience.responses))


def some_prompts_pay(prompts, responses):
    """A reward that says nothing about the responses to half of the prompts."""
    scores = share_of_early_letters(prompts, responses)
    return [score if prompt < "b" or prompt > "d" else 0.5 for prompt, score in zip(prompts, scores, strict=True)]


@pytest.mark.invariant(25)
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_every_token_of_a_response_is_credited_with_what_it_scored_above_its_group(divide_by_std):
    experience = fit(still(kl_coef=0.0, divide_by_std=divide_by_std), iterations=1).experiences[0]
    assert len(experience) == GROUP * len(PROMPTS)
    scores = scores_of(experience).double()
    for i in range(0, len(scores), GROUP):
        assert len(set(experience.prompts[i : i + GROUP])) == 1
        group = scores[i : i + GROUP]
        expected = group - sum(group) / GROUP
        if divide_by_std and expected.abs().max() > 0:
            expected = expected / (sum(expected**2) / (GROUP - 1)) ** 0.5
        rows, mask = experience.advantages[i : i + GROUP], experience.response_mask[i : i + GROUP]
        wanted = torch.where(mask, expected[:, None].float(), 0.0)
        torch.testing.assert_close(rows, wanted, rtol=1e-3, atol=1e-6)  # for the 1e-4 beside the deviation
    assert scores.std() > 0.1


@pytest.mark.invariant(22)
def test_a_response_is_charged_for_its_whole_divergence_before_its_group_is_compared():
    module = still(kl_coef=0.5, divide_by_std=False, reference=network(tiny_gpt2(), seed=1))
    experience = fit(module, iterations=1).experiences[0]
    log_ratio = torch.where(experience.response_mask, experience.old_logprobs - experience.ref_logprobs, 0.0)
    total = scores_of(experience) - 0.5 * log_ratio.sum(1)
    assert log_ratio.sum(1).std() > 1.0
    groups = total.reshape(-1, GROUP)
    expected = (groups - groups.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(experience.advantages[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert bool(experience.has_signal.all())
    terms, _ = module.loss(experience)  # and the loss has no other term: the ratio is 1
    mask = experience.sampled_mask
    torch.testing.assert_close(-terms[mask].detach(), experience.advantages[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.invariant(22)
def test_a_divergence_in_the_loss_is_in_the_loss_alone():
    arguments = {"reference": network(tiny_gpt2(), seed=1), "kl_in": "loss", "divide_by_std": False}
    module = still(kl_coef=0.5, **arguments)
    experience = fit(module, iterations=1).experiences[0]
    groups = scores_of(experience).reshape(-1, GROUP)
    expected = (groups - groups.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(experience.advantages[:, 0], expected, rtol=0, atol=1e-6)
    assert experience.has_signal is None  # every row has a gradient, whatever it scored
    terms, metrics = module.loss(experience)
    log_ratio = experience.old_logprobs - experience.ref_logprobs
    mask = experience.sampled_mask
    by_hand = (0.5 * ((-log_ratio).exp() - 1 + log_ratio))[mask]
    difference = (terms - metrics["policy/loss"]).detach()[mask]
    torch.testing.assert_close(difference, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.invariant(10, 22)
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_without_a_coefficient_there_is_no_reference_and_no_term(kl_in):
    module = grpo(kl_coef=0.0, kl_in=kl_in)
    seen = fit(module, iterations=1)
    assert module.reference is None
    assert seen.experiences[0].has_signal is not None
    assert not any(name.startswith("kl/") for name in seen.metrics[0])


@pytest.mark.invariant(22)
@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"group_size": 1}, ValueError, "`group_size=1` must be at least 2: a response is compared with its group"),
        ({"kl_in": "both"}, ValueError, "`kl_in='both'` must be 'reward' or 'loss': the divergence is charged once"),
        ({"kl_coef": -0.1}, ValueError, "`kl_coef=-0.1` must not be negative"),
        ({"kl_coef": 0.0, "reference": "gpt2"}, ValueError, "`reference='gpt2'` would be read by nothing"),
        ({"kl_estimator": "k2"}, TypeError, "`kl_estimator='k2'` is no argument of GRPOModule"),
        ({"responses_per_prompt": 4}, TypeError, "`responses_per_prompt` is called `group_size` here"),
        ({"clip_range": [0.1]}, ValueError, r"`clip_range=\[0.1\]` must be a number of at least 0, or two"),
        ({"averaging": "rows"}, ValueError, "`averaging='rows'` must be 'tokens', 'responses' or 'length'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, error, complaint):
    with pytest.raises(error, match=complaint):
        grpo(**arguments)


def test_scores_of_tokens_count_as_their_sum():
    def dense(prompts, responses, response_tokens):
        scores = share_of_early_letters(prompts, responses)
        return [[score / len(row)] * len(row) for row, score in zip(response_tokens, scores, strict=True)]

    of_tokens = fit(still(reward=dense), iterations=1).experiences[0]
    whole = fit(still(), iterations=1).experiences[0]
    torch.testing.assert_close(of_tokens.advantages, whole.advantages, rtol=0, atol=1e-3)


@pytest.mark.invariant(9)
def test_the_ratio_is_exactly_one_where_an_iteration_makes_one_update():
    module = still(minibatch_size=GROUP * len(PROMPTS))
    ratios = []
    ratio = module.ratio
    module.ratio = lambda *arguments: ratios.append(ratio(*arguments)) or ratios[-1]
    metrics = fit(module).metrics[-1]
    assert len(ratios) == 3
    assert all((ratio == 1.0).all() for ratio in ratios)
    assert metrics["policy/clip_fraction"] == 0.0
    assert 0.0 < metrics["policy/sampler_gap"] < 1e-5


@pytest.mark.invariant(9)
def test_without_learning_the_ratio_stays_one_but_for_rounding():
    metrics = fit(still(num_epochs=2, micro_batch_size=3)).metrics[-1]
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clip_fraction"] == 0.0


@pytest.mark.invariant(29)
def test_the_clip_range_may_differ_below_and_above():
    module = still(kl_coef=0.0, clip_range=[0.1, 0.4], num_epochs=2)
    experience = fit(module, iterations=1).experiences[0]
    mask, advantages = experience.sampled_mask, experience.advantages
    for ratio, above, below in ((1.3, 1.3, 1.3), (1.5, 1.4, 1.5), (0.8, 0.8, 0.9)):
        module.ratio = lambda logprobs, batch, ratio=ratio: torch.full_like(logprobs, ratio)
        terms, metrics = module.loss(experience)
        expected = -torch.where(advantages > 0, above, below) * advantages
        torch.testing.assert_close(terms[mask], expected[mask], rtol=1e-6, atol=1e-6)
        assert float(metrics["policy/clip_fraction"].mean()) == (ratio != 1.3)


@pytest.mark.invariant(30, 31, 40)
@pytest.mark.parametrize("averaging", ["tokens", "responses", "length"])
def test_no_split_into_micro_batches_changes_weights_or_metrics(averaging):
    results = []
    for micro_batch_size in (None, 1, 3):
        module = grpo(averaging=averaging, micro_batch_size=micro_batch_size, reward=some_prompts_pay, kl_coef=0.0)
        metrics = fit(module, iterations=2).metrics[-1]
        results.append((weights(module), {k: v for k, v in metrics.items() if not k.startswith(("time/", "speed/"))}))
    for other, others in results[1:]:
        torch.testing.assert_close(other, results[0][0], rtol=0, atol=1e-6)
        assert others == pytest.approx(results[0][1], abs=2e-5)


# --- groups without a signal ------------------------------------------------------------------------------------------


class Everything(GRPOModule):
    """Learns from every row, signal or not."""

    def experience(self, rollouts, scores):
        experience = super().experience(rollouts, scores)
        experience.has_signal = None
        return experience


def rows_run(module):
    """Rows of every pass of the policy with a gradient, one count a micro-batch; filled while it trains."""
    counts = []
    loss = module.loss
    module.loss = lambda batch: counts.append(len(batch)) or loss(batch)
    return counts


@pytest.mark.invariant(30, 31)
@pytest.mark.parametrize("averaging", ["tokens", "responses", "length"])
def test_groups_without_a_signal_are_not_run_and_change_no_weight(averaging):
    arguments = {"averaging": averaging, "reward": some_prompts_pay, "kl_coef": 0.0, "num_epochs": 2}
    arguments["optimizer"] = functools.partial(sgd, lr=0.05, weight_decay=0.01)
    some, every = (module_of(cls, group_size=GROUP, minibatch_size=8, **arguments) for cls in (GRPOModule, Everything))
    fewer, all_rows = rows_run(some), rows_run(every)
    seen, expected = fit(some), fit(every)
    torch.testing.assert_close(weights(some), weights(every), rtol=0, atol=1e-6)
    assert sum(all_rows) == 3 * 2 * GROUP * len(PROMPTS)
    assert sum(fewer) < 0.7 * sum(all_rows)
    for one, other in zip(seen.metrics, expected.metrics, strict=True):
        for name in ("policy/loss", "optim/grad_norm", "optim/lr", "reward/mean"):
            assert one[name] == pytest.approx(other[name], abs=1e-5), name
    # Prompts that begin with b, c or d: three of six.
    assert seen.metrics[0]["reward/equal_group_rate"] >= 0.5


def test_where_no_group_has_a_signal_steps_are_made_all_the_same():
    """Momentum, weight decay and the count of updates do not depend on what is left out."""

    def alike(prompts, responses):
        return [0.1] * len(responses) if module_is_bored else share_of_early_letters(prompts, responses)

    decaying = functools.partial(sgd, weight_decay=0.1)
    results = []
    for cls in (GRPOModule, Everything):
        module_is_bored = False
        module = module_of(cls, group_size=GROUP, reward=alike, kl_coef=0.0, optimizer=decaying, minibatch_size=12)
        module.configure_model()
        fit(module, iterations=1)
        module_is_bored = True
        before, counts = weights(module), rows_run(module)
        seen = fit(module, iterations=1)
        assert seen.metrics[0]["optim/grad_norm"] == 0.0
        assert seen.metrics[0]["reward/equal_group_rate"] == 1.0
        assert (weights(module) - before).abs().max() > 1e-4  # weight decay
        results.append((weights(module), sum(counts)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-7)
    assert (results[0][1], results[1][1]) == (2, 24)  # one row stands in for a minibatch


def test_equal_scores_have_a_signal_where_the_divergence_differs():
    def alike(prompts, responses):
        return [1.0] * len(responses)

    module = still(reward=alike, kl_coef=0.1, reference=network(tiny_gpt2(), seed=1))
    seen = fit(module, iterations=1)
    assert bool(seen.experiences[0].has_signal.all())
    assert seen.metrics[0]["reward/equal_group_rate"] == 1.0


# --- as any online module ---------------------------------------------------------------------------------------------


@pytest.mark.invariant(11)
def test_the_reference_does_not_move_while_the_policy_does():
    module = grpo()
    module.configure_model()
    start, before = weights(module), fingerprint(module.reference.network)
    seen = fit(module)
    assert (weights(module) - start).abs().max() > 1e-3
    assert fingerprint(module.reference.network) == before
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    expected = (
        "reward/mean reward/std reward/share_of_early_letters reward/equal_group_rate kl/sequence kl/token kl/coef "
        "policy/loss policy/entropy policy/ratio policy/clip_fraction policy/sampler_gap response/length "
        "response/eos_rate response/truncation_rate optim/grad_norm optim/lr time/generate time/score time/update "
        "speed/tokens_per_second"
    )
    assert set(expected.split()) == set(seen.metrics[0])


def test_defaults_are_those_of_the_paper():
    module = GRPOModule("gpt2", reward=share_of_early_letters)
    assert (module.num_epochs, module.kl_coef, module.averaging, module.divide_by_std) == (1, 0.04, "responses", True)
    assert (module.responses_per_prompt, module.clip_range) == (8, (0.2, 0.2))
