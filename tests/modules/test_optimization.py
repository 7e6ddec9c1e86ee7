import functools
import math

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, StepLR

from lightning_rlhf.modules.optimization import default_optimizer, make_optimizer, make_scheduler, plain_factory


def groups():
    names = ("policy", "value")
    return [{"params": [torch.nn.Parameter(torch.ones(2))], "name": name} for name in names]


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.25)


def rates(scheduler, updates, warmup_updates=0, planned=None):
    """What each update is made with; half the run is over where nothing is planned."""
    done = 0
    optimizer = plain_sgd(groups())
    schedule = make_scheduler(scheduler, optimizer, warmup_updates, lambda: done / planned if planned else 0.5)
    used = []
    for _ in range(updates):
        used.append(optimizer.param_groups[0]["lr"] / 0.25)
        assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        done += 1
        schedule.step()
    return used


def test_a_constant_rate_stays():
    assert rates("constant", 4, planned=4) == [1.0] * 4


def test_a_linear_rate_falls_in_a_line_that_would_reach_zero_after_the_last_update():
    assert rates("linear", 4, planned=4) == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-12)


def test_a_cosine_rate_falls_as_half_a_cosine():
    expected = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert rates("cosine", 4, planned=4) == pytest.approx(expected, abs=1e-12)


def test_a_run_that_goes_on_beyond_its_plan_does_not_turn_around():
    for name in ("linear", "cosine"):
        assert rates(name, 5, planned=2)[2:] == pytest.approx([0.0] * 3, abs=1e-12)


def test_warming_up_the_rate_rises_in_a_line_and_the_first_update_moves():
    assert rates("constant", 6, warmup_updates=4, planned=6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warming_up_multiplies_what_the_schedule_says():
    expected = [0.25 * 1.0, 0.5 * 0.75, 0.75 * 0.5, 1.0 * 0.25]
    assert rates("linear", 4, warmup_updates=4, planned=4) == pytest.approx(expected, abs=1e-12)


def test_a_factory_counts_for_itself():
    schedule = functools.partial(StepLR, step_size=2, gamma=0.1)
    assert rates(schedule, 5) == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01], abs=1e-12)


def test_a_schedule_may_be_given_in_its_plain_form():
    plain = plain_factory(functools.partial(StepLR, step_size=2, gamma=0.1))
    assert rates(plain, 5) == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01], abs=1e-12)
    constant = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 0.5, "total_iters": 9}}
    assert rates(constant, 3) == [0.5] * 3
    assert rates("torch.optim.lr_scheduler.LinearLR", 2) == rates(LinearLR, 2) != [1.0, 1.0]


@pytest.mark.parametrize("name", ["square", "Linear", ""])
def test_an_unknown_schedule_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"`lr_scheduler='{name}'` must be one of \['constant', 'cosine', 'linear'\]"):
        rates(name, 1)


@pytest.mark.parametrize("scheduler", [LinearLR, {"class_path": "torch.optim.lr_scheduler.LinearLR"}])
def test_warming_up_is_for_named_schedules(scheduler):
    with pytest.raises(ValueError, match="`warmup_updates=3` goes with a named `lr_scheduler`"):
        rates(scheduler, 1, warmup_updates=3)


def test_the_default_is_adamw_with_the_settings_of_trlx():
    optimizer = make_optimizer(None, groups())
    assert type(optimizer) is torch.optim.AdamW
    for group, name in zip(optimizer.param_groups, ("policy", "value"), strict=True):
        settings = {key: group[key] for key in ("name", "lr", "betas", "eps", "weight_decay", "amsgrad")}
        assert settings == {
            "name": name,
            "lr": 3e-5,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 1e-6,
            "amsgrad": False,
        }
    assert type(default_optimizer([torch.nn.Parameter(torch.ones(1))])) is torch.optim.AdamW


@pytest.mark.parametrize(
    "optimizer",
    [
        plain_sgd,
        lambda parameters: torch.optim.SGD(parameters, lr=0.25),
        functools.partial(torch.optim.SGD, lr=0.25),
        {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}},
        plain_factory(functools.partial(torch.optim.SGD, lr=0.25)),
        "tests.modules.test_optimization.plain_sgd",
    ],
    ids=["function", "lambda", "partial", "dict", "plain partial", "dotted name"],
)
def test_an_optimizer_may_come_in_any_form(optimizer):
    made = make_optimizer(optimizer, groups())
    assert type(made) is torch.optim.SGD
    assert [(group["name"], group["lr"]) for group in made.param_groups] == [("policy", 0.25), ("value", 0.25)]


def test_a_class_alone_has_its_own_defaults():
    assert make_optimizer(torch.optim.Adam, groups()).defaults["lr"] == 1e-3
    assert make_optimizer({"class_path": "torch.optim.Adam"}, groups()).defaults["lr"] == 1e-3


def test_a_partial_of_a_class_becomes_plain_and_anything_else_stays():
    partial = functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99))
    assert plain_factory(partial) == {
        "class_path": "torch.optim.adamw.AdamW",
        "init_args": {"lr": 1e-3, "betas": (0.9, 0.99)},
    }
    for other in (plain_sgd, torch.optim.SGD, functools.partial(plain_sgd), functools.partial(StepLR, None), None, "x"):
        assert plain_factory(other) is other


@pytest.mark.parametrize(
    ("optimizer", "error", "complaint"),
    [
        ({"lr": 0.1}, TypeError, r"`optimizer={'lr': 0.1}` must be a factory, or a dict with 'class_path'"),
        (0.1, TypeError, "`optimizer=0.1` must be a factory"),
        ("math.pi", TypeError, "`optimizer=3.14.*` must be a factory"),
        ("adam", ValueError, "`optimizer='adam'` must be a callable or the dotted name of one"),
        ({"class_path": "torch.optim.Smooth"}, ValueError, "`optimizer='torch.optim.Smooth'` must be a callable"),
    ],
)
def test_what_makes_no_optimizer_is_an_error_that_quotes_it(optimizer, error, complaint):
    with pytest.raises(error, match=complaint):
        make_optimizer(optimizer, groups())


def test_what_makes_no_schedule_is_one_too():
    with pytest.raises(TypeError, match=r"`lr_scheduler={'step_size': 2}` must be a factory"):
        rates({"step_size": 2}, 1)
    with pytest.raises(TypeError, match="`lr_scheduler=None` must be a factory"):
        rates(None, 1)
