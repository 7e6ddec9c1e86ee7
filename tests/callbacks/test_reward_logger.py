import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_rlhf import PPOModule
from lightning_rlhf.callbacks import RewardLogger
from lightning_rlhf.callbacks.reward_logger import gather_rows, group_means, group_sums, log_distribution
from tests.training import PROMPTS, fit, module_of, share_of_early_letters


def words_after_early_prompts(prompts, responses):
    """Has nothing to say about half of them."""
    pairs = zip(prompts, responses, strict=True)
    return [float(len(response.split())) if prompt[0] in "abc" else None for prompt, response in pairs]


def seen_by(logger, **arguments):
    """Two iterations; the scores that they gave, by name and iteration."""
    module = module_of(PPOModule, reward=[share_of_early_letters, (words_after_early_prompts, 0.5)])
    seen = fit(module, iterations=2, logger=logger, callbacks=[RewardLogger(**arguments)])
    scores = [{"total": e.scores.total, **e.scores.by_name} for e in seen.experiences]
    return [
        {name: values[~values.isnan()].double().numpy() for name, values in of_iteration.items()}
        for of_iteration in scores
    ]


def test_tensorboard_gets_a_histogram_and_numbers_of_every_reward(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = seen_by(TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    for name in ("total", "share_of_early_letters", "words_after_early_prompts"):
        histograms = events.Histograms(f"reward/{name}/histogram")
        assert [event.step for event in histograms] == [0, 1]
        for event, scores in zip(histograms, (of_iteration[name] for of_iteration in expected), strict=True):
            drawn = event.histogram_value
            assert drawn.num == len(scores)
            assert (drawn.min, drawn.max) == (scores.min(), scores.max())
            assert drawn.sum == pytest.approx(scores.sum(), abs=1e-9)
        for statistic, of in {"std": lambda x: x.std(ddof=1), "min": np.min, "max": np.max}.items():
            logged = [event.value for event in events.Scalars(f"reward/{name}/{statistic}")]
            assert logged == pytest.approx([of(of_iteration[name]) for of_iteration in expected], abs=1e-6)
    assert {len(of_iteration["words_after_early_prompts"]) for of_iteration in expected} == {3}


def logged_in(folder):
    with (folder / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return {(name, int(row["step"])): float(value) for row in rows for name, value in row.items() if value}


def test_a_logger_that_draws_nothing_gets_quantiles(tmp_path):
    expected = seen_by(CSVLogger(tmp_path, name="", version=""))
    logged = logged_in(tmp_path)
    for iteration, by_name in enumerate(expected):
        for name, scores in by_name.items():
            for percent in (5, 25, 50, 75, 95):
                key = (f"reward/{name}/q{percent:02}", iteration)
                assert logged[key] == pytest.approx(np.quantile(scores, percent / 100), abs=1e-6)
            assert logged[f"reward/{name}/std", iteration] == pytest.approx(scores.std(ddof=1), abs=1e-6)


def test_it_logs_every_so_many_iterations(tmp_path):
    seen_by(CSVLogger(tmp_path, name="", version=""), every_n_iterations=2)
    steps = {step for name, step in logged_in(tmp_path) if name == "reward/total/std"}
    assert steps == {0}


def test_without_a_logger_it_does_nothing():
    assert len(seen_by(logger=False)) == 2


def test_a_reward_that_applied_to_no_response_of_an_iteration_is_left_out_of_it(tmp_path):
    def never(prompts, responses):
        return [None for _ in responses]

    module = module_of(PPOModule, reward=[share_of_early_letters, never])
    fit(module, iterations=1, logger=CSVLogger(tmp_path, name="", version=""), callbacks=[RewardLogger()])
    names = {name for name, _ in logged_in(tmp_path)}
    assert "reward/share_of_early_letters/std" in names
    assert not any(name.startswith("reward/never/") for name in names)


def test_rows_that_a_process_lacks_are_not_counted(monkeypatch):
    other = torch.tensor([5.0, 6.0, 7.0])
    monkeypatch.setattr(
        "lightning_rlhf.callbacks.reward_logger.gather_over_ranks", lambda tensor: torch.stack([tensor, other])
    )
    rows = gather_rows(torch.tensor([1.0, 2.0]), 3)
    assert rows[~rows.isnan()].tolist() == [1.0, 2.0, 5.0, 6.0, 7.0]


class WandbLogger:
    def __init__(self):
        self.logged = []
        self.experiment = SimpleNamespace(log=lambda metrics, commit: self.logged.append((metrics, commit)))

    def log_metrics(self, metrics, step):
        self.logged.append((metrics, step))


def test_weights_and_biases_gets_a_histogram_in_the_same_step_as_the_numbers(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=tuple))
    logger = WandbLogger()
    log_distribution(logger, "reward/cats", torch.tensor([1.0, 3.0], dtype=torch.float64), step=4)
    histogram, numbers = logger.logged
    assert histogram == ({"reward/cats/histogram": (1.0, 3.0)}, False)
    assert numbers == ({"reward/cats/std": 2**0.5, "reward/cats/min": 1.0, "reward/cats/max": 3.0}, 4)


def test_a_single_score_has_no_spread(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    log_distribution(logger, "reward/cats", torch.tensor([2.0], dtype=torch.float64), step=0)
    logger.save()
    assert {logged_in(tmp_path)[f"reward/cats/{name}", 0] for name in ("min", "max", "q05", "q95")} == {2.0}
    assert logged_in(tmp_path)["reward/cats/std", 0] == 0.0


@pytest.mark.parametrize("number", [0, -1])
def test_it_cannot_log_every_zero_iterations(number):
    with pytest.raises(ValueError, match=f"`every_n_iterations={number}` must be at least 1"):
        RewardLogger(every_n_iterations=number)


ROWS = [{"prompt": prompt, "task": task} for prompt, task in zip(PROMPTS, "xyxyxx", strict=True)]


def test_every_group_of_the_metadata_has_a_mean_of_its_own(tmp_path):
    rewards = [share_of_early_letters, (words_after_early_prompts, 0.5)]
    seen = fit(
        module_of(PPOModule, reward=rewards),
        iterations=2,
        prompts=ROWS,
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[RewardLogger(group_by="task")],
    )
    logged = logged_in(tmp_path)
    for iteration, experience in enumerate(seen.experiences):
        groups = {"x": [], "y": []}
        for i, task in enumerate(experience.metadata["task"]):
            groups[task].append(i)
        assert len(groups["x"]) == 4
        for name, scores in {"total": experience.scores.total, **experience.scores.by_name}.items():
            for task, rows in groups.items():
                expected = np.nanmean(scores[rows].double().numpy())
                assert logged[f"reward/{name}/task/{task}", iteration] == pytest.approx(expected, abs=1e-7)


@pytest.mark.invariant(40)
def test_groups_of_all_processes_count_together_response_by_response():
    here = group_sums({"cats": torch.tensor([1.0, 2.0, 6.0, float("nan")])}, ["x", "x", 3, 3])
    there = group_sums({"cats": torch.tensor([9.0, 5.0])}, ["x", None])
    assert group_means([here, there]) == {("cats", "x"): 4.0, ("cats", "3"): 6.0, ("cats", "None"): 5.0}
    assert list(group_means([there, here])) == [("cats", "3"), ("cats", "None"), ("cats", "x")]


def test_a_key_that_the_rows_do_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"`group_by='tsak'` is no key of the prompts' rows: \['task'\] are"):
        fit(
            module_of(PPOModule),
            prompts=ROWS,
            logger=CSVLogger(tmp_path, name="", version=""),
            callbacks=[RewardLogger(group_by="tsak")],
        )


def test_a_key_with_a_value_of_its_own_for_every_row_is_probably_a_mistake(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("lightning_rlhf.callbacks.reward_logger.rank_zero_warn", warned.append)
    monkeypatch.setattr("lightning_rlhf.callbacks.reward_logger.MANY_GROUPS", 3)
    fit(
        module_of(PPOModule),
        iterations=2,
        prompts=[{"prompt": prompt, "task": i} for i, prompt in enumerate(PROMPTS)],
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[RewardLogger(group_by="task")],
    )
    assert len(warned) == 1
    assert warned[0].startswith("`group_by='task'` has more than 3 values in an iteration")
