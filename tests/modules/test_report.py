import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lightning_rlhf.batches import Experience, Scores
from lightning_rlhf.modules.report import Report
from tests.networks import EOS, written

NAN = float("nan")


def experience(**more):
    """Responses of 3, 1 and 2 tokens; EOS ends the first, the last was cut off, and the second wrote a stop string."""
    rollouts = written([[0]] * 3, [[1, 2, EOS], [3], [4, 5]])
    rollouts = replace(
        rollouts,
        old_logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 99.0, 99.0], [-5.0, -6.0, 99.0]]),
        truncated=torch.tensor([False, False, True]),
        **more.pop("rollouts", {}),
    )
    scores = Scores(
        total=torch.tensor([1.0, 2.0, 6.0]),
        by_name={"cats": torch.tensor([1.0, NAN, 4.0]), "dogs": torch.tensor([0.0, 2.0, 1.0])},
    )
    return Experience.from_rollouts(rollouts, scores=scores, advantages=torch.zeros(3, 3), **more)


def observed(**more):
    report = Report()
    report.observe(experience(**more), (EOS,))
    return {name: (statistic.mean, statistic.std) for name, statistic in report.reduce().items()}


def test_what_can_be_said_before_the_updates_is_said():
    metrics = observed()
    means = {name: mean for name, (mean, _) in metrics.items()}
    assert means == pytest.approx(
        {
            "reward/mean": 3.0,
            "reward/cats": 2.5,  # it did not apply to the second
            "reward/dogs": 1.0,
            "response/length": 2.0,
            "response/eos_rate": 1 / 3,
            "response/truncation_rate": 1 / 3,
        },
        abs=1e-6,
    )
    assert metrics["reward/mean"][1] == pytest.approx(math.sqrt(7.0), rel=1e-6)


def test_the_divergence_from_the_reference_is_logged_per_token_and_per_response():
    ref_logprobs = torch.tensor([[-1.5, -2.0, -4.0], [-4.0, 0.0, 0.0], [-5.0, -9.0, 0.0]])
    metrics = observed(ref_logprobs=ref_logprobs)
    # The log-ratios are 0.5, 0, 1; 0; 0, 3.
    assert metrics["kl/sequence"][0] == pytest.approx(1.5, abs=1e-6)
    assert metrics["kl/token"][0] == pytest.approx(0.75, abs=1e-6)


def test_forced_tokens_are_no_part_of_the_divergence_but_of_the_length():
    ref_logprobs = torch.tensor([[-1.5, -2.0, -4.0], [-4.0, 0.0, 0.0], [-5.0, -9.0, 0.0]])
    sampled = torch.tensor([[True, True, True], [True, False, False], [True, False, False]])
    metrics = observed(ref_logprobs=ref_logprobs, rollouts={"sampled_mask": sampled})
    assert metrics["kl/sequence"][0] == pytest.approx(0.5, abs=1e-6)
    assert metrics["kl/token"][0] == pytest.approx(0.3, abs=1e-6)
    assert metrics["response/length"][0] == 2.0


def test_how_much_the_sampler_left_to_draw_from_is_logged_where_it_left_something_out():
    kept = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert observed(rollouts={"kept_mass": kept})["policy/kept_mass"][0] == pytest.approx(5.0 / 6, abs=1e-6)
    assert "policy/kept_mass" not in observed()


def test_any_of_several_tokens_may_end_a_response():
    report = Report()
    report.observe(experience(), (EOS, 3, 9))
    assert report.reduce()["response/eos_rate"].mean == pytest.approx(2 / 3, abs=1e-6)


def sent(report, **more):
    """What loggers and callbacks get."""
    logged, shown = [], []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((dict(metrics), step)))
    trainer = SimpleNamespace(loggers=[logger, logger])
    module = SimpleNamespace(
        trainer=trainer, log_dict=lambda metrics, **options: shown.append((dict(metrics), options))
    )
    report.send(module, **{"iteration": 7, "tokens": torch.tensor(30), "seconds": 2.0, **more})
    return logged, shown


def test_every_logger_gets_everything_with_the_iteration_as_its_step():
    report = Report()
    report.observe(experience(), (EOS,))
    logged, _ = sent(report)
    assert len(logged) == 2
    assert logged[0] == logged[1]
    metrics, step = logged[0]
    assert step == 7
    assert set(metrics) == {
        "reward/mean",
        "reward/std",
        "reward/cats",
        "reward/dogs",
        "response/length",
        "response/eos_rate",
        "response/truncation_rate",
        "speed/tokens_per_second",
    }
    assert metrics["reward/std"] == pytest.approx(math.sqrt(7.0), rel=1e-6)
    assert metrics["speed/tokens_per_second"] == 15.0


def test_callbacks_get_everything_once_and_the_progress_bar_a_few():
    report = Report()
    report.observe(experience(ref_logprobs=torch.zeros(3, 3)), (EOS,))
    logged, shown = sent(report)
    assert not any(options["logger"] for _, options in shown)
    together = {}
    for metrics, _ in shown:
        assert not set(metrics) & set(together)
        together |= metrics
    assert together == logged[0][0]
    on_the_bar = [set(metrics) for metrics, options in shown if options.get("prog_bar")]
    assert on_the_bar == [{"reward/mean", "kl/sequence", "speed/tokens_per_second"}]


def test_the_next_iteration_starts_from_nothing():
    report = Report()
    report.observe(experience(), (EOS,))
    sent(report)
    report.add("reward/mean", torch.tensor([5.0]))
    logged, _ = sent(report)
    assert set(logged[0][0]) == {"reward/mean", "reward/std", "speed/tokens_per_second"}


@pytest.mark.invariant(40)
def test_tokens_of_all_ranks_make_the_speed(monkeypatch):
    monkeypatch.setattr("lightning_rlhf.modules.report.sum_over_ranks", lambda tokens: 2 * tokens)
    report = Report()
    report.observe(experience(), (EOS,))
    logged, _ = sent(report)
    assert logged[0][0]["speed/tokens_per_second"] == 30.0


def test_a_phase_is_timed():
    report, trainer = Report(), SimpleNamespace(progress_bar_callback=None)
    for seconds in (0.02, 0.04):
        with report.phase("score", trainer):
            time.sleep(seconds)
    assert 0.03 <= report.reduce()["time/score"].mean < 0.3
