"""Rewards that are called in a thread of their own."""

import threading
import time

import pytest

from lightning_rlhf.modules.scoring import scored
from lightning_rlhf.rewards.combine import CombinedReward
from tests.networks import written


def test_a_reward_is_waited_for_where_what_is_done_meanwhile_fails():
    begun, done = threading.Event(), []

    def slow(prompts, responses):
        begun.set()
        time.sleep(0.2)
        done.append(len(responses))
        return [0.0] * len(responses)

    def fails():
        assert begun.wait(timeout=20)
        raise KeyError("the reference")

    with pytest.raises(KeyError, match="the reference"):
        scored(CombinedReward(slow), written([[1], [2]], [[3], [4]]), None, fails)
    assert done == [2]
