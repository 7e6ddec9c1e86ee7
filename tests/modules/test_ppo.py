import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.models.reference import fingerprint
from tests.networks import ARCHITECTURES, EOS, USUAL, network, tiny_gpt2
from tests.training import PROMPTS, Seen, bare_trainer, fit, module_of, share_of_early_letters, weights


def still(**arguments):
    """A module that does not move."""
    return module_of(PPOModule, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), **arguments)


@pytest.mark.invariant(9)
def test_the_ratio_is_exactly_one_where_an_iteration_makes_one_update():
    module = still(num_epochs=1, minibatch_size=6)
    ratios = []
    ratio = module.ratio
    module.ratio = lambda *arguments: ratios.append(ratio(*arguments)) or ratios[-1]
    metrics = fit(module).metrics[-1]
    assert len(ratios) == 3
    assert all((ratio == 1.0).all() for ratio in ratios)
    assert metrics["policy/clip_fraction"] == 0.0
    assert 0.0 < metrics["policy/sampler_gap"] < 1e-5


@pytest.mark.invariant(9)
def test_without_learning_the_ratio_stays_one_but_for_rounding_over_epochs_and_minibatches():
    metrics = fit(still(num_epochs=3, minibatch_size=4, micro_batch_size=1)).metrics[-1]
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clip_fraction"] == 0.0


@pytest.mark.invariant(10)
@pytest.mark.parametrize("tied", [True, False])
def test_the_divergence_from_the_reference_is_zero_at_the_start(tied):
    seen = fit(module_of(PPOModule, tiny_gpt2(tie_word_embeddings=tied, initializer_range=0.3)), iterations=2)
    assert seen.metrics[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    assert abs(seen.metrics[1]["kl/sequence"]) > 1e-3


@pytest.mark.invariant(11)
@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_does_not_move(tied):
    module = module_of(PPOModule, tiny_gpt2(tie_word_embeddings=tied, initializer_range=0.3))
    module.configure_model()
    start, before = weights(module), fingerprint(module.reference.network)
    assert before == fingerprint(type(module.reference.network)(module.policy.decoder))
    fit(module)
    assert (weights(module) - start).abs().max() > 1e-3
    assert fingerprint(module.reference.network) == before


def test_nothing_of_the_reference_is_trained_or_saved_with_the_policy():
    module = module_of(PPOModule)
    module.configure_model()
    assert not any("reference" in name for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in module.reference.network.parameters())


@pytest.mark.invariant(24, 30, 40)
@pytest.mark.parametrize("averaging", ["tokens", "responses", "length"])
def test_no_split_into_micro_batches_changes_weights_or_metrics(averaging):
    results = []
    splits = [{}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 9}]
    for split in splits:
        module = module_of(PPOModule, **split, averaging=averaging, ent_coef=0.01)
        metrics = fit(module).metrics[-1]
        results.append((weights(module), {k: v for k, v in metrics.items() if not k.startswith(("time/", "speed/"))}))
    lengths = metrics["response/length"]
    assert lengths != round(lengths)  # uneven, or the test shows nothing
    for other, others in results[1:]:
        torch.testing.assert_close(other, results[0][0], rtol=0, atol=1e-6)
        assert others == pytest.approx(results[0][1], abs=2e-5)


@pytest.mark.invariant(3, 19)
def test_the_token_that_ends_a_response_earns_the_score_and_its_predecessors_are_credited():
    module = still(kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False)
    seen = fit(module, iterations=1)
    experience = seen.experiences[0]
    ended = ~experience.truncated
    assert 0 < ended.sum() < len(ended)
    last = experience.response_mask.sum(1) - 1
    tokens = experience.response_tokens.gather(1, last[:, None]).squeeze(1)
    assert bool((tokens[ended] == EOS).all())
    scores = torch.tensor(share_of_early_letters(experience.prompts, experience.responses))
    # With lambda and gamma 1 every token's return is the score.
    expected = torch.where(experience.response_mask, scores[:, None], 0.0)
    torch.testing.assert_close(experience.returns, expected, rtol=0, atol=1e-6)


@pytest.mark.invariant(19)
def test_dense_scores_that_lie_on_the_last_token_are_the_same_as_one_score():
    def dense(prompts, responses, response_tokens):
        scores = share_of_early_letters(prompts, responses)
        return [[0.0] * (len(row) - 1) + [score] for row, score in zip(response_tokens, scores, strict=True)]

    one, many = module_of(PPOModule), module_of(PPOModule, reward=dense)
    fit(one)
    fit(many)
    torch.testing.assert_close(weights(many), weights(one), rtol=0, atol=0)


def test_the_charge_for_leaving_the_reference_is_in_the_returns():
    reference = network(tiny_gpt2(), seed=1)
    module = still(kl_coef=0.5, reference=reference, gae_lambda=1.0, whiten_advantages=False, reward_clip=None)
    experience = fit(module, iterations=1).experiences[0]
    mask = experience.sampled_mask
    charge = torch.where(mask, 0.5 * (experience.old_logprobs - experience.ref_logprobs), 0.0)
    assert charge.abs().max() > 0.1
    to_come = charge.flip(1).cumsum(1).flip(1)
    scores = torch.tensor(share_of_early_letters(experience.prompts, experience.responses))
    expected = torch.where(mask, scores[:, None] - to_come, 0.0)
    torch.testing.assert_close(experience.returns, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_divergence_in_the_loss_is_in_the_loss_alone(estimator):
    reference = network(tiny_gpt2(), seed=1)
    arguments = {"reference": reference, "kl_in": "loss", "kl_estimator": estimator}
    dear, cheap = (still(kl_coef=coef, **arguments) for coef in (0.5, 1e-30))
    experience, other = (fit(module, iterations=1).experiences[0] for module in (dear, cheap))
    assert experience.returns.equal(other.returns)
    terms, others = (module.loss(experience)[0].detach() for module in (dear, cheap))
    log_ratio = experience.old_logprobs - experience.ref_logprobs
    by_hand = {"k2": log_ratio.square() / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[estimator]
    mask = experience.sampled_mask
    torch.testing.assert_close((terms - others)[mask], 0.5 * by_hand[mask], rtol=1e-4, atol=1e-4)


def test_the_entropy_is_a_bonus():
    without, with_bonus = still(kl_coef=0.0), still(kl_coef=0.0, ent_coef=0.1)
    experience = fit(without, iterations=1).experiences[0]
    fit(with_bonus, iterations=1)
    difference = with_bonus.loss(experience)[0] - without.loss(experience)[0]
    tokens = torch.cat([experience.prompt_tokens, experience.response_tokens], dim=1)
    padded = torch.cat([experience.prompt_mask, experience.response_mask], dim=1).long()
    positions = (padded.cumsum(1) - 1).clamp(min=0)
    model = without.policy.decoder.model
    logits = model(input_ids=tokens, attention_mask=padded, position_ids=positions).logits
    start = experience.prompt_tokens.shape[1] - 1
    entropy = torch.distributions.Categorical(logits=logits[:, start:-1]).entropy()
    mask = experience.response_mask
    torch.testing.assert_close(difference[mask], -0.1 * entropy[mask], rtol=0, atol=1e-5)


@pytest.mark.invariant(10)
def test_without_a_coefficient_no_reference_is_built_and_none_is_logged():
    module = module_of(PPOModule, kl_coef=0.0)
    metrics = fit(module, iterations=1).metrics[0]
    assert module.reference is None
    assert not any(name.startswith("kl/") for name in metrics)


def test_the_critic_warms_up_while_the_policy_stays_bit_equal():
    module = module_of(PPOModule, critic_warmup=2, optimizer=None)
    module.configure_model()
    policy = fingerprint(module.policy.decoder)
    head = fingerprint(module.policy.value_head)
    fit(module, iterations=2)
    assert fingerprint(module.policy.decoder) == policy
    assert fingerprint(module.policy.value_head) != head
    fit(module, iterations=1)
    assert fingerprint(module.policy.decoder) != policy


@pytest.mark.invariant(23)
def test_a_response_that_was_cut_off_is_bootstrapped_only_if_asked():
    cut, bootstrapped = (
        fit(still(kl_coef=0.0, gae_lambda=0.0, gamma=0.9, whiten_advantages=False, bootstrap_truncated=asked), 1)
        for asked in (False, True)
    )
    one, other = cut.experiences[0], bootstrapped.experiences[0]
    torch.testing.assert_close(one.response_tokens, other.response_tokens)
    difference = other.returns - one.returns
    last = one.response_mask.sum(1) - 1
    expected = torch.zeros_like(difference)
    expected[torch.arange(len(last)), last] = 0.9 * other.final_values
    assert other.final_values[one.truncated].abs().min() > 0
    assert other.final_values[~one.truncated].abs().max() == 0
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-6)


@pytest.mark.invariant(24)
def test_advantages_are_whitened_over_all_tokens_of_the_iteration():
    experience = fit(still(), iterations=1, prompts=PROMPTS * 4).experiences[0]
    assert not experience.sampled_mask.all()
    advantages = experience.advantages[experience.sampled_mask].double()
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantages.var(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert experience.advantages[~experience.sampled_mask].abs().max() == 0


@pytest.mark.invariant(36)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    arguments = {"reward_scaling": "running", "lr_scheduler": "linear", "optimizer": None, "seed": 5}
    data = {"prompts": PROMPTS * 4, "batch_size": 6, "seed": 5}
    whole, resumed = Seen(), Seen()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=8, save_on_train_epoch_end=False)
    first = module_of(PPOModule, **arguments)
    trainer = bare_trainer(max_epochs=2, callbacks=[keep, whole], enable_checkpointing=True)
    trainer.fit(first, datamodule=PromptDataModule(**data))
    middle = sorted(tmp_path.glob("*step=24.ckpt"))  # after 3 of the first epoch's 4 iterations
    assert len(middle) == 1

    second = module_of(PPOModule, **arguments)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=8, save_on_train_epoch_end=False)
    trainer = bare_trainer(max_epochs=2, callbacks=[keep, resumed], enable_checkpointing=True)
    trainer.fit(second, datamodule=PromptDataModule(**data), ckpt_path=middle[0])
    assert len(whole.metrics) == 8
    assert len(resumed.metrics) == 5
    for later, expected in zip(resumed.metrics, whole.metrics[3:], strict=True):
        assert {k: v for k, v in later.items() if not k.startswith(("time/", "speed/"))} == {
            k: v for k, v in expected.items() if not k.startswith(("time/", "speed/"))
        }
    assert fingerprint(first.policy) == fingerprint(second.policy)


@pytest.mark.invariant(36)
def test_a_reference_without_a_name_is_part_of_the_checkpoint(tmp_path):
    first = module_of(PPOModule, network(tiny_gpt2(), seed=1), optimizer=None)
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(first, datamodule=PromptDataModule(PROMPTS, batch_size=6))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    second = module_of(PPOModule, network(tiny_gpt2(), seed=2), optimizer=None)
    data = PromptDataModule(PROMPTS, batch_size=6)
    bare_trainer(max_epochs=2).fit(second, datamodule=data, ckpt_path=tmp_path / "run.ckpt")
    assert fingerprint(second.reference.network) == fingerprint(first.reference.network)


@pytest.mark.invariant(36)
def test_a_run_is_not_resumed_against_another_reference(tmp_path):
    folder = tmp_path / "policy"
    network(tiny_gpt2(), seed=1).save_pretrained(folder)
    trainer = bare_trainer(max_epochs=1)
    data = {"prompts": PROMPTS, "batch_size": 6}
    trainer.fit(module_of(PPOModule, folder, optimizer=None), datamodule=PromptDataModule(**data))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    network(tiny_gpt2(), seed=2).save_pretrained(folder)
    resumed = module_of(PPOModule, folder, optimizer=None)
    with pytest.raises(ValueError, match="`reference` is not the one that the checkpoint was trained against"):
        bare_trainer(max_epochs=2).fit(resumed, datamodule=PromptDataModule(**data), ckpt_path=tmp_path / "run.ckpt")


def test_a_second_fit_has_a_schedule_of_its_own():
    module = module_of(PPOModule, lr_scheduler="linear", num_epochs=1, minibatch_size=6)
    for _ in range(2):
        rates = [metrics["optim/lr"] for metrics in fit(module, iterations=4).metrics]
        assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    assert module.iteration == 8


def test_every_iteration_is_logged_whatever_the_trainer_says(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(module_of(PPOModule), logger=logger, log_every_n_steps=2)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    steps = [row.split(",")[names.index("step")] for row in rows]
    assert steps == ["0", "1", "2"]
    expected = (
        "reward/mean reward/std reward/share_of_early_letters kl/sequence kl/token kl/coef policy/loss policy/entropy "
        "policy/ratio policy/clip_fraction policy/sampler_gap value/loss value/explained_variance value/clip_fraction "
        "response/length response/eos_rate response/truncation_rate optim/grad_norm optim/lr time/generate time/score "
        "time/update speed/tokens_per_second"
    )
    assert set(expected.split()) | {"step"} == set(names)


@pytest.mark.invariant(14)
@pytest.mark.parametrize("name", USUAL)
def test_one_iteration_runs_on_any_decoder(name):
    module = module_of(PPOModule, network(ARCHITECTURES[name]()))
    seen = fit(module, iterations=1)
    metrics = seen.metrics[0]
    assert metrics["policy/sampler_gap"] < 1e-5
    assert metrics["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    assert all(abs(value) < float("inf") for value in metrics.values())
    module.generate(["a b", "c"])


@pytest.mark.invariant(40)
def test_rewards_are_averaged_over_responses_not_over_batches():
    seen = fit(still(), iterations=1)
    experience = seen.experiences[0]
    scores = torch.tensor(share_of_early_letters(experience.prompts, experience.responses), dtype=torch.float64)
    assert seen.metrics[0]["reward/mean"] == pytest.approx(float(scores.mean()), abs=1e-6)
    assert seen.metrics[0]["reward/std"] == pytest.approx(float(scores.std()), abs=1e-6)
    lengths = experience.response_mask.sum(1).double()
    assert seen.metrics[0]["response/length"] == pytest.approx(float(lengths.mean()), abs=1e-6)


@pytest.mark.invariant(36)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_run_in_another_precision_knows_its_reference_again(tmp_path, precision):
    folder = tmp_path / "policy"
    network(tiny_gpt2(), seed=1).save_pretrained(folder)
    trainer = bare_trainer(max_epochs=1, precision=precision)
    data = {"prompts": PROMPTS, "batch_size": 6}
    trainer.fit(module_of(PPOModule, folder, optimizer=None), datamodule=PromptDataModule(**data))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = module_of(PPOModule, folder, optimizer=None)
    trainer = bare_trainer(max_epochs=2, precision=precision)
    trainer.fit(resumed, datamodule=PromptDataModule(**data), ckpt_path=tmp_path / "run.ckpt")
    assert resumed.iteration == 2
