import functools
import operator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from lightning_rlhf import ModelSpec, PPOModule, Sampling, SFTModule
from lightning_rlhf.modules.arguments import given_arguments, plain_arguments, reject_unknown
from tests.networks import tiny_gpt2, word_tokenizer


def score(prompts, responses):
    return [0.0 for _ in responses]


class Judge:
    def __call__(self, prompts, responses):
        return [0.0 for _ in responses]

    def score(self, prompts, responses):
        return self(prompts, responses)


judge = Judge()


def test_what_a_class_was_called_with_is_known_by_name():
    given = given_arguments(PPOModule, ("gpt2",), {"reward": score, "clip_range": 0.3, "num_epochs": 2})
    assert given == {"policy": "gpt2", "reward": score, "clip_range": 0.3, "num_epochs": 2}


def test_defaults_are_not_what_was_given():
    assert given_arguments(PPOModule, (), {"policy": "gpt2"}) == {"policy": "gpt2"}


def test_of_a_call_that_does_not_fit_nothing_is_known():
    assert given_arguments(PPOModule, ("gpt2", 1, 2), {}) == {}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (0.2, 0.2),
        (None, None),
        ("responses", "responses"),
        ((0.1, 0.2), [0.1, 0.2]),
        (Path("a") / "b", "a/b"),
        (Sampling(max_new_tokens=3, stop=("x",)), {**Sampling(max_new_tokens=3).plain(), "stop": ["x"]}),
        ({"max_new_tokens": 3}, {"max_new_tokens": 3}),
        (ModelSpec("gpt2", dtype="bfloat16"), {**vars(ModelSpec("gpt2")), "dtype": "bfloat16"}),
        (ModelSpec(Path("a") / "b"), {**vars(ModelSpec("gpt2")), "model": "a/b"}),
        (operator.itemgetter, "operator.itemgetter"),
        (len, "builtins.len"),
        (score, "tests.modules.test_arguments.score"),
        (["my_reward.score", (score, 0.5)], ["my_reward.score", ["tests.modules.test_arguments.score", 0.5]]),
        (torch.optim.SGD, "torch.optim.sgd.SGD"),
        (
            functools.partial(torch.optim.SGD, lr=0.1),
            {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}},
        ),
        (np.float32(0.5), 0.5),
        ([np.int64(3)], [3]),
        (np.bool_(True), True),
    ],
)
def test_what_can_be_stored_is_stored_as_plain_values(value, plain):
    (stored,) = plain_arguments({"x": value}).values()
    assert stored == plain
    assert type(stored) is type(plain)


def hidden_import(prompts, responses):
    return score(prompts, responses)


hidden_import.__qualname__ = "score"


@pytest.mark.parametrize(
    "value",
    [
        lambda prompts, responses: [],
        functools.partial(score),
        judge,
        judge.score,
        Judge.score,
        hidden_import,
        [score, judge],
        {"model": tiny_gpt2()},
        tiny_gpt2(),
        ModelSpec(tiny_gpt2()),
        word_tokenizer(),
        torch.zeros(2),
        functools.partial(torch.optim.SGD, lr=torch.tensor(0.1)),
    ],
)
def test_what_cannot_be_had_again_is_left_out(value):
    assert plain_arguments({"x": value, "y": 1}) == {"y": 1}


def test_a_function_that_is_defined_in_a_function_is_left_out():
    def inner(prompts, responses):
        return []

    assert plain_arguments({"reward": inner}) == {}


@pytest.mark.parametrize(
    ("cls", "name", "remedy"),
    [
        (PPOModule, "clip_rnage", "did you mean `clip_range`"),
        (PPOModule, "minibatchsize", "did you mean `minibatch_size`"),
        (PPOModule, "warmup_steps", "did you mean `warmup_updates`"),
        (PPOModule, "tokeniser", "did you mean `tokenizer`"),
        (SFTModule, "optimiser", "did you mean `optimizer`"),
        (
            SFTModule,
            "clip_range",
            "it takes .*disable_dropout, evaluation_sampling, .*lr_scheduler, neftune_alpha, optimizer, policy, s",
        ),
    ],
)
def test_an_unknown_argument_is_an_error_that_suggests_the_right_one(cls, name, remedy):
    with pytest.raises(TypeError, match=f"^`{name}=7` is no argument of {cls.__name__}: {remedy}"):
        reject_unknown(cls, {name: 7})


def test_nothing_unknown_is_no_error():
    reject_unknown(PPOModule, {})


def test_the_names_of_a_class_of_ones_own_are_known_too():
    class Mine(PPOModule):
        def __init__(self, policy, *, my_weight=1.0, **kwargs):
            super().__init__(policy, **kwargs)

    with pytest.raises(TypeError, match="`my_wieght=7` is no argument of Mine: did you mean `my_weight`"):
        reject_unknown(Mine, {"my_wieght": 7})


def module(**arguments):
    defaults = {"policy": tiny_gpt2(), "tokenizer": word_tokenizer(), "reward": score}
    return PPOModule(**{**defaults, **arguments})


def test_a_module_keeps_what_it_was_given_as_plain_hyper_parameters_and_its_seed():
    hparams = module(
        seed=3, clip_range=(0.1, 0.2), sampling=Sampling(max_new_tokens=4), kl_coef=np.float64(0.5)
    ).hparams
    assert dict(hparams) == {
        "reward": "tests.modules.test_arguments.score",
        "seed": 3,
        "clip_range": [0.1, 0.2],
        "sampling": Sampling(max_new_tokens=4).plain(),
        "kl_coef": 0.5,
    }
    assert type(hparams["kl_coef"]) is float


def test_the_seed_that_was_meant_is_kept_where_none_was_given():
    L.seed_everything(11, verbose=False)
    assert module().hparams["seed"] == 11
