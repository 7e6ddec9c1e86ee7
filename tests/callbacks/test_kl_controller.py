import pytest

from lightning_rlhf import ConversationDataModule, PPOModule, PromptDataModule
from lightning_rlhf.callbacks import KLController, RolloutCheckpoint
from tests.training import PROMPTS, Seen, bare_trainer, fit, module_of, sft

TIMINGS = ("time/", "speed/")


def ppo(**arguments):
    return module_of(PPOModule, **{"kl_coef": 0.1, "responses_per_prompt": 2, **arguments})


@pytest.mark.invariant(26)
@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.005),  # a tenth above, times 50 of 1,000
        (5.4, 0.995),
        (7.2, 1.01),
        (600.0, 1.01),  # no more than a fifth
        (4.8, 0.99),
        (0.0, 0.99),
        (-3.0, 0.99),
    ],
)
def test_the_price_rises_with_the_divergence_by_a_fifth_of_the_step_at_most(kl, factor):
    controller = KLController(target=6.0, horizon=1000)
    assert controller.updated(0.1, kl, responses=50) == pytest.approx(0.1 * factor, rel=1e-12)


@pytest.mark.invariant(26)
def test_what_an_iteration_measures_sets_the_price_of_the_next(tmp_path):
    target, horizon = 0.5, 100
    controller = KLController(target, horizon)
    module = ppo()
    seen = fit(module, iterations=5, callbacks=[controller])
    expected, errors = [0.1], []
    for experience in seen.experiences:
        log_ratio = (experience.old_logprobs - experience.ref_logprobs).double()
        per_response = [float(row[mask].sum()) for row, mask in zip(log_ratio, experience.sampled_mask, strict=True)]
        assert len(per_response) == 12
        errors.append(sum(per_response) / 12 / target - 1)
        expected.append(expected[-1] * (1 + min(max(errors[-1], -0.2), 0.2) * 12 / horizon))
    assert errors[0] == pytest.approx(-1.0, abs=1e-5)  # where policy and reference are one
    assert max(errors) > 0.2
    assert [metrics["kl/coef"] for metrics in seen.metrics] == pytest.approx(expected[:5], rel=1e-6)
    assert module.kl_coef == pytest.approx(expected[5], rel=1e-6)


@pytest.mark.invariant(36)
def test_a_resumed_run_goes_on_with_the_same_prices(tmp_path):
    def run(**flags):
        seen = Seen()
        keep = RolloutCheckpoint(tmp_path, every_n_rollouts=1, save_top_k=-1, save_policy=False)
        callbacks = [KLController(0.5, 100), seen, keep]
        trainer = bare_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(ppo(lr_scheduler="linear"), datamodule=PromptDataModule(PROMPTS, batch_size=2), **flags)
        return [{k: v for k, v in m.items() if not k.startswith(TIMINGS)} for m in seen.metrics]

    whole = run()
    resumed = run(ckpt_path=tmp_path / "iteration=2.ckpt")
    assert len({metrics["kl/coef"] for metrics in whole}) == 6
    assert resumed == whole[2:]


def test_without_a_target_the_price_stays():
    module = ppo()
    seen = fit(module, iterations=3, callbacks=[KLController()])
    assert [metrics["kl/coef"] for metrics in seen.metrics] == pytest.approx([0.1] * 3)
    assert module.kl_coef == 0.1


@pytest.mark.invariant(22)
@pytest.mark.parametrize("target", [None, 6.0])
def test_a_module_without_a_kl_term_has_nothing_to_steer(target):
    with pytest.raises(ValueError, match="`KLController` cannot steer `kl_coef=0`, at which PPOModule has no refere"):
        fit(ppo(kl_coef=0), callbacks=[KLController(target)])
    trainer = bare_trainer(max_epochs=1, callbacks=[KLController(target)])
    with pytest.raises(ValueError, match="`KLController` steers `kl_coef`, which SFTModule does not have: leave it"):
        trainer.fit(sft(), datamodule=ConversationDataModule(["a b c"]))


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_is_a_positive_number(target):
    with pytest.raises(ValueError, match=f"`target={target}` must be positive, in nats a response, or None for a fix"):
        KLController(target=target)


def test_a_horizon_that_one_iteration_would_use_up():
    with pytest.raises(ValueError, match="`horizon=0` must be at least 1, in responses."):
        KLController(target=6.0, horizon=0)
    with pytest.raises(ValueError, match="`horizon=2` must be more than 0.2 times the 12 responses of an iteration"):
        fit(ppo(), callbacks=[KLController(target=6.0, horizon=2)])
    fit(ppo(), callbacks=[KLController(target=6.0, horizon=3)], iterations=1)
