"""Rewards that are awaited, belong to a thread, or cannot be pickled."""

import asyncio
import functools
import pickle
import sqlite3
import threading
import time

import pytest

from lightning_rlhf import PPOModule
from lightning_rlhf.rewards.combine import CombinedReward
from lightning_rlhf.rewards.functions import RewardFunction
from lightning_rlhf.rewards.metrics import MetricFunction
from lightning_rlhf.rewards.threads import begun, finished
from tests.networks import word_tokenizer, written
from tests.training import fit, module_of


def rollouts():
    batch = written([[0], [1]], [[1], [2]])
    batch.metadata = {"answer": [7, 8]}
    return batch


async def judge(prompts, responses, answer):
    await asyncio.sleep(0.0)
    return answer


class Judge:
    async def __call__(self, prompts, responses):
        await asyncio.sleep(0.0)
        return [1, None]


@pytest.mark.parametrize(
    "function", [judge, functools.partial(judge), lambda prompts, responses, answer: judge(0, 0, answer)]
)
def test_an_async_function_is_awaited(function):
    assert RewardFunction(function)(rollouts(), None) == [7.0, 8.0]


def test_so_are_objects_and_metrics():
    first, second = RewardFunction(Judge())(rollouts(), None)
    assert (first, second != second) == (1.0, True)

    async def metric(prompts, responses):
        return {"one": 1}

    assert MetricFunction(metric)(rollouts(), None) == {"one": [1.0, 1.0]}


def test_all_are_awaited_in_one_loop_side_by_side_while_others_work():
    loops, met, events = set(), [], []

    async def waits_for_the_other(prompts, responses):
        loops.add(asyncio.get_running_loop())
        met.append(1)
        while len(met) < 2:
            await asyncio.sleep(0.001)
        return [1, 1]

    async def too(prompts, responses):
        return await waits_for_the_other(prompts, responses)

    def works(prompts, responses):
        for _ in range(1000):
            if len(met) == 2:
                break
            time.sleep(0.005)
        events.append(len(met))
        return [0, 0]

    for _ in range(2):
        met.clear()
        scores = CombinedReward([works, waits_for_the_other, too])(rollouts(), word_tokenizer())
        assert list(scores.by_name) == ["works", "waits_for_the_other", "too"]
        assert scores.total.tolist() == [2.0, 2.0]
    assert events == [2, 2]
    assert len(loops) == 1


def test_within_a_running_loop_too():
    async def main():
        return RewardFunction(judge)(rollouts(), None)

    assert asyncio.run(main()) == [7.0, 8.0]


@pytest.mark.invariant(39)
@pytest.mark.parametrize("error", [OSError, asyncio.CancelledError])
def test_what_it_raises_names_the_reward(error):
    async def breaks(prompts, responses):
        await asyncio.sleep(0.0)
        raise error("enough")

    with pytest.raises(RuntimeError, match=r"`reward` 'breaks' raised .*\(on 2 responses, the first of which is"):
        RewardFunction(breaks)(rollouts(), None)
    with pytest.raises(RuntimeError, match="`reward` 'breaks' raised"):
        fit(module_of(PPOModule, reward=[breaks, judge_nothing]), iterations=1)


async def judge_nothing(prompts, responses):
    return [0.0] * len(responses)


def test_when_another_reward_fails_what_is_awaited_is_ended():
    ended = threading.Event()

    async def waits(prompts, responses):
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.set()

    def breaks(prompts, responses):
        time.sleep(0.05)
        raise OSError("enough")

    with pytest.raises(RuntimeError, match="`reward` 'breaks' raised OSError: enough"):
        CombinedReward([waits, breaks])(rollouts(), None)
    assert ended.wait(5.0)


def test_whoever_stops_waiting_ends_what_was_awaited():
    ended = threading.Event()

    async def waits():
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.set()

    coming = begun(waits())
    threading.Timer(0.05, lambda: coming.set_exception(KeyboardInterrupt())).start()
    with pytest.raises(KeyboardInterrupt):
        finished(coming)
    assert not ended.is_set() or ended.wait(5.0)


class Rowed:
    """Neither pickled nor shared: a database of the thread that calls it first."""

    def __init__(self):
        self.lock = threading.Lock()
        self.database = None

    def __call__(self, prompts, responses):
        if self.database is None:
            self.database = sqlite3.connect(":memory:")
        with self.lock:
            return [self.database.execute("select length(?)", [response]).fetchone()[0] for response in responses]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_reward_of_one_thread_that_cannot_be_pickled_is_called_there_in_every_iteration(in_background):
    reward = Rowed()
    with pytest.raises(TypeError):
        pickle.dumps(reward)
    seen = fit(module_of(PPOModule, reward=reward, reward_in_background=in_background), iterations=2)
    for experience in seen.experiences:
        assert experience.scores.total.tolist() == [float(len(response)) for response in experience.responses]
    if not in_background:
        reward.database.close()


def test_in_the_background_an_async_reward_has_the_same_loop():
    loops = []

    async def judge(prompts, responses):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(responses)

    fit(module_of(PPOModule, reward=judge, reward_in_background=True), iterations=2)
    RewardFunction(judge)(rollouts(), None)
    assert len(loops) == 3
    assert len(set(loops)) == 1
