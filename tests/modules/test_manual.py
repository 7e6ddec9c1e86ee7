import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_rlhf import PromptDataModule
from lightning_rlhf.batches import Experience
from lightning_rlhf.modules.online import OnlineModule
from tests.networks import tiny_gpt2, word_tokenizer
from tests.training import PROMPTS, bare_trainer, fit, module_of, weights


class Reinforce(OnlineModule):
    """The least there is to an algorithm: every token is credited with the score of its response."""

    def experience(self, rollouts, scores):
        advantages = torch.where(rollouts.sampled_mask, scores.total[:, None], 0.0)
        return Experience.from_rollouts(rollouts, scores=scores, advantages=advantages)

    def loss(self, batch):
        logprobs = self.policy(batch).logprobs
        self.ratio(logprobs, batch)
        terms = -logprobs * batch.advantages
        return terms, {"policy/loss": terms}


class Rates(Callback):
    """The rate that every update is made with, and how many there were so far when an iteration ended."""

    def __init__(self):
        self.used, self.updates = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args):
        self.updates.append(trainer.global_step)


def share_of_early_letters(prompts, responses):
    words = [response.split() for response in responses]
    return [sum(word < "d" for word in row) / max(len(row), 1) for row in words]


def reinforce(cls=Reinforce, **arguments):
    """One that makes four updates an iteration on the six prompts; one token in eight ends a response."""
    defaults = {
        "kl_coef": 0.0,
        "num_epochs": 2,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.5),
        "reward": share_of_early_letters,
        "tokenizer": word_tokenizer(8),
        "seed": 8,  # one that writes responses of many lengths
    }
    return module_of(cls, tiny_gpt2(8, initializer_range=0.3), **{**defaults, **arguments})


def gradient_by_hand(model, experience):
    """Of the mean over tokens of -log-prob x score, row by row, unpadded, through transformers alone."""
    assert len(set(experience.response_mask.sum(1).tolist())) > 2  # or the test shows little
    total, count = torch.zeros(()), 0
    for i in range(len(experience)):
        prompt = experience.prompt_tokens[i][experience.prompt_mask[i]]
        response = experience.response_tokens[i][experience.response_mask[i]]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, response[:, None])
        total, count = total - logprobs.sum() * experience.scores.total[i], count + len(response)
    model.zero_grad()
    (total / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.invariant(30)
@pytest.mark.parametrize("limit", [None, 1e6, 0.05])
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_an_update_is_the_gradient_cut_to_the_norm_that_is_allowed(limit, micro_batch_size):
    module = reinforce(max_grad_norm=limit, num_epochs=2, minibatch_size=6, micro_batch_size=micro_batch_size)
    module.configure_model()
    model = copy.deepcopy(module.policy.decoder.model)
    seen = fit(module, iterations=1)
    norms = []
    for _ in range(2):
        gradient = gradient_by_hand(model, seen.experiences[0])
        norms.append(float(gradient.norm()))
        now = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        step = 0.5 * gradient * min(1.0, (limit or 1e6) / norms[-1])
        torch.nn.utils.vector_to_parameters(now - step, model.parameters())
    assert min(norms) > 0.1
    assert seen.metrics[0]["optim/grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    expected = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=2e-6)


def test_the_norm_that_is_logged_is_the_mean_over_updates_before_clipping():
    norms = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])))

    seen = fit(reinforce(max_grad_norm=0.01), iterations=1, callbacks=[Norms()])
    assert len(norms) == 4
    assert seen.metrics[0]["optim/grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-5)


def rates_of(module, **flags):
    rates = Rates()
    seen = fit(module, callbacks=[rates], **flags)
    return [rate / 0.5 for rate in rates.used], rates.updates, seen


def test_a_linear_rate_falls_with_every_update_over_the_iterations_that_are_planned():
    used, updates, seen = rates_of(reinforce(lr_scheduler="linear"), iterations=3)
    assert updates == [4, 8, 12]
    assert used == pytest.approx([1 - k / 12 for k in range(12)], abs=1e-9)
    assert seen.metrics[1]["optim/lr"] == pytest.approx(0.5 * (1 - 5.5 / 12), rel=1e-6)


def test_a_linear_rate_falls_over_the_updates_that_are_allowed_where_those_end_sooner():
    used, updates, _ = rates_of(reinforce(lr_scheduler="linear"), iterations=3, max_steps=6)
    assert updates == [4, 8]  # the limit is looked at between iterations
    assert used == pytest.approx([1 - k / 6 for k in range(6)] + [0.0, 0.0], abs=1e-9)


def test_warming_up_takes_updates_and_not_iterations():
    used, _, _ = rates_of(reinforce(warmup_updates=8), iterations=3)
    assert used == pytest.approx([k / 8 for k in range(1, 9)] + [1.0] * 4, abs=1e-9)


def test_a_second_fit_has_a_schedule_of_its_own():
    module = reinforce(lr_scheduler="linear")
    for _ in range(2):
        used, _, _ = rates_of(module, iterations=2)
        assert used == pytest.approx([1 - k / 8 for k in range(8)], abs=1e-9)
    assert module.iteration == 4


class Drifting(Reinforce):
    """Keeps how far every minibatch has strayed: ratio - 1 - log ratio, averaged over its tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.strayed = []

    def update(self, minibatch):
        total, count = 0.0, 0
        for batch in minibatch.micro_batches:
            with torch.no_grad():
                log_ratio = (self.policy(batch).logprobs - batch.old_logprobs)[batch.sampled_mask].double()
            total += float((log_ratio.exp() - 1 - log_ratio).sum())
            count += len(log_ratio)
        self.strayed.append(total / count)
        super().update(minibatch)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_an_iteration_ends_after_the_minibatch_that_strays_beyond_the_target(micro_batch_size):
    slow = functools.partial(torch.optim.SGD, lr=0.05)
    arguments = {"micro_batch_size": micro_batch_size, "optimizer": slow}
    free = reinforce(Drifting, **arguments)
    fit(free, iterations=1)
    first, second, third, _ = free.strayed
    assert first < 1e-9 < second < third
    for target, expected in ((second / 2, 2), ((second + third) / 2, 3), (1e6, 4)):
        bound = reinforce(Drifting, target_kl=target, **arguments)
        _, updates, _ = rates_of(bound, iterations=1)
        assert updates == [expected]
        assert bound.strayed == free.strayed[:expected]


def test_the_next_iteration_begins_with_updates_again():
    _, updates, _ = rates_of(reinforce(target_kl=1e-6), iterations=3)
    assert updates == [2, 4, 6]


def test_a_target_that_is_never_reached_changes_nothing():
    free, bound = reinforce(), reinforce(target_kl=1e6)
    for module in (free, bound):
        fit(module, iterations=2)
    assert torch.equal(weights(free), weights(bound))


@pytest.mark.invariant(9)
def test_the_gap_to_the_sampler_is_that_of_the_first_update_alone():
    module = reinforce(Drifting)
    metrics = fit(module, iterations=1).metrics[0]
    assert module.strayed[-1] > 1e-4
    assert 0 < metrics["policy/sampler_gap"] < 1e-5


@pytest.mark.invariant(36)
def test_the_noise_of_an_update_depends_on_its_place_and_not_on_what_was_drawn_before():
    class Noisy(Reinforce):
        def loss(self, batch):
            self.__dict__.setdefault("drawn", []).append(float(torch.rand(())))
            return super().loss(batch)

    drawn = []
    for seed in (1, 1, 2):
        module = reinforce(Noisy, seed=seed, micro_batch_size=2)
        torch.rand(seed)
        fit(module, iterations=2)
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(drawn[0]) == 12


@pytest.mark.invariant(36)
def test_minibatches_depend_on_seed_and_iteration_alone():
    class Planned(Reinforce):
        def update(self, minibatch):
            rows = sorted(prompt for batch in minibatch.micro_batches for prompt in batch.prompts)
            self.__dict__.setdefault("plans", []).append(rows)
            super().update(minibatch)

    plans = []
    for seed in (1, 1, 2):
        module = reinforce(Planned, seed=seed, minibatch_size=3, num_epochs=1)
        torch.rand(seed)
        data = PromptDataModule(PROMPTS, batch_size=6, shuffle=False)  # or the rows themselves would change places
        bare_trainer(max_epochs=4).fit(module, datamodule=data)
        plans.append(module.plans)
    assert plans[0] == plans[1] != plans[2]
    assert all(sorted(plans[0][i] + plans[0][i + 1]) == sorted(PROMPTS) for i in (0, 2, 4, 6))
    assert len({tuple(plan) for plan in plans[0][::2]}) > 1


@pytest.mark.invariant(28)
def test_every_row_that_is_learnt_from_has_its_own_score():
    class Checking(Reinforce):
        def loss(self, batch):
            assert batch.scores.total.tolist() == pytest.approx(share_of_early_letters(batch.prompts, batch.responses))
            assert self.texts(batch.response_tokens, batch.response_mask) == batch.responses
            self.__dict__.setdefault("scores", set()).update(batch.scores.total.tolist())
            return super().loss(batch)

    module = reinforce(Checking, micro_batch_size=2)
    seen = fit(module, iterations=2, prompts=PROMPTS * 2)
    assert len(module.scores) > 3
    assert len(set(seen.experiences[0].response_mask.sum(1).tolist())) > 2


def test_a_loss_that_is_not_a_number_where_nothing_counts_does_no_harm():
    class Careless(Reinforce):
        def loss(self, batch):
            terms, metrics = super().loss(batch)
            terms = torch.where(batch.sampled_mask, terms, torch.nan)
            return terms, {"policy/loss": terms, "policy/other": terms.detach()}

    careful, careless = reinforce(), reinforce(Careless)
    metrics = [fit(module, iterations=1).metrics[0] for module in (careful, careless)]
    assert torch.equal(weights(careful), weights(careless))
    assert metrics[0]["policy/loss"] == metrics[1]["policy/loss"]
    assert abs(metrics[1]["policy/other"]) < 1e3
