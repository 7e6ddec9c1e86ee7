"""Steps that can be recorded, made without a GPU: they say the same as those from a cache that grows."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.chance import row_uniforms
from lightning_rlhf.data.tokens import padded
from lightning_rlhf.generation import recorder as recording
from lightning_rlhf.generation.decode import DecodeLoop
from lightning_rlhf.generation.recorder import Recorder, level
from lightning_rlhf.generation.sampling import Sampling
from lightning_rlhf.generation.steps import Steps
from lightning_rlhf.models.encoder_decoder import decoder_of
from lightning_rlhf.models.fixed_cache import FixedCache
from lightning_rlhf.models.freezing import freeze
from lightning_rlhf.models.heads import ValueHead
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.probing import probe
from tests.generation.test_decode import CLOSE, ENDS, PROMPTS, decoded, policy_of, prompts_for
from tests.networks import ARCHITECTURES, PAD, network

LONG = Sampling(max_new_tokens=20)


def same(found, expected) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.truncated, expected.truncated)
    for name in ("logprobs", "values", "final_values", "trunk"):
        assert_close(getattr(found, name), getattr(expected, name), **CLOSE)


@pytest.mark.invariant(2, 9)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_writes_the_same_by_fixed_steps_or_is_refused_in_words(name: str) -> None:
    policy, recorder = policy_of(name), Recorder(records=False)
    expected = decoded(policy, LONG, prompts_for(policy), with_final_values=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = decoded(policy, LONG, prompts_for(policy), with_final_values=True, recorder=recorder)
    same(found, expected)
    refusals = [warning for warning in said if "cannot be decoded by recorded steps" in str(warning.message)]
    assert recorder.is_refused == bool(refusals)
    if name in ("gpt2", "gpt_neox", "gptj", "llama", "qwen3", "opt", "gemma", "phi"):
        assert recorder.fixed is not None, "it is to be recorded"
        assert recorder.trials == recording.TRIED


def frozen_policy():
    policy = policy_of("llama")
    probe(policy.decoder)
    freeze(policy.decoder, 1)
    return policy


@pytest.mark.invariant(2, 14)
@pytest.mark.parametrize("group_size", [1, 3])
def test_batches_of_any_width_follow_each_other_and_finished_rows_leave(group_size: int, monkeypatch) -> None:
    policy, recorder = frozen_policy(), Recorder(records=False)
    batches: list[int] = []
    read = policy.next_token

    def watched(tokens, mask, cache, positions=None):
        if positions is not None:
            batches.append(len(tokens))
        return read(tokens, mask, cache, positions)

    monkeypatch.setattr(policy, "next_token", watched)
    for number, prompts in enumerate((PROMPTS, PROMPTS[::-1], [[2] * 30, *PROMPTS[1:]], PROMPTS[:3])):
        chance = [number + row for row in range(group_size * len(prompts))]
        tokens, mask = padded(prompts, PAD, "left")
        uniforms = row_uniforms(0, "rollout", (), chance, LONG.max_new_tokens)
        found, expected = (
            DecodeLoop(policy, LONG, ENDS, with_final_values=True, trunk_bytes=2**20, recorder=which)(
                tokens, mask, uniforms, group_size
            )
            for which in (recorder, None)
        )
        assert expected.trunk is not None
        is_real = torch.cat(
            [mask.repeat_interleave(group_size, 0), expected.mask[:, 1:]], dim=1
        )  # nobody reads a last token
        found.trunk, expected.trunk = found.trunk[is_real], expected.trunk[is_real]
        same(found, expected)
        assert expected.mask.sum(1).min() < 6, "some end early"
    assert not recorder.is_refused
    assert set(batches) >= {8 * group_size, 4 * group_size, 2 * group_size}


def test_short_responses_are_not_recorded_and_other_kinds_of_cache_neither() -> None:
    policy, recorder = policy_of("llama"), Recorder(records=False)
    decoded(policy, Sampling(max_new_tokens=recording.FEWEST - 1), PROMPTS, recorder=recorder)
    assert recorder.fixed is None
    decoded(policy, LONG, PROMPTS, recorder=Recorder())
    assert recorder.fixed is None, "there is no GPU to record on"
    decoded(policy_of("mistral"), LONG, PROMPTS, recorder=recorder)
    assert recorder.fixed is None, "what falls out of a window is not kept"
    decoded(policy_of("t5"), LONG, PROMPTS, recorder=recorder)
    assert recorder.fixed is None


def test_a_step_that_says_something_else_is_refused_and_nothing_else_changes(monkeypatch) -> None:
    policy = policy_of("llama")
    expected = decoded(policy, LONG, PROMPTS, with_final_values=True)
    for trial in (1, 2):  # wrong at once, or once a number that should have moved did not
        recorder, advance = Recorder(records=False), FixedCache.advance

        def wrong(self, tokens, trial=trial, recorder=recorder, advance=advance):
            advance(self, tokens)
            if recorder.trials + 1 == trial:
                self.positions += 3

        with monkeypatch.context() as patched:
            patched.setattr(FixedCache, "advance", wrong)
            with pytest.warns(UserWarning, match="recorded steps .logits differ"):
                found = decoded(policy, LONG, PROMPTS, with_final_values=True, recorder=recorder)
        same(found, expected)
        assert recorder.is_refused
        same(decoded(policy, LONG, PROMPTS, with_final_values=True, recorder=recorder), expected)
        assert recorder.trials == trial


def test_weights_that_moved_are_read_where_they_are() -> None:
    policy, recorder = policy_of("llama"), Recorder(records=False)
    decoded(policy, LONG, PROMPTS, recorder=recorder)
    before = recorder.fixed
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)  # as an update does
    decoded(policy, LONG, PROMPTS, recorder=recorder)
    assert recorder.fixed is before
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone()  # as when they come back from elsewhere
    decoded(policy, LONG, PROMPTS, recorder=recorder)
    assert recorder.fixed is not before


def test_a_recorder_is_copied_and_pickled_without_what_it_recorded() -> None:
    recorder = Recorder(records=False)
    decoded(policy_of("llama"), LONG, PROMPTS, recorder=recorder)
    assert recorder.fixed.nbytes > 0
    for other in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert other.fixed is None
        assert (other.records, other.trials) == (False, 0)


@pytest.mark.parametrize(
    ("columns", "expected"), [(1, 64), (64, 64), (65, 128), (129, 192), (192, 192), (193, 256), (257, 384), (500, 512)]
)
def test_levels_lie_half_as_far_apart_as_powers_of_two(columns: int, expected: int) -> None:
    assert level(columns) == expected


def test_what_validation_began_training_goes_on_with() -> None:
    policy, recorder = policy_of("llama"), Recorder(records=False)
    expected = decoded(policy, LONG, PROMPTS, with_final_values=True)
    with torch.inference_mode():  # as Lightning validates
        same(decoded(policy, LONG, PROMPTS, with_final_values=True, recorder=recorder), expected)
    before = recorder.fixed
    same(decoded(policy, LONG, PROMPTS, with_final_values=True, recorder=recorder), expected)
    assert recorder.fixed is before


def test_the_cache_that_grows_is_let_go_once_steps_are_trusted() -> None:
    policy, recorder = policy_of("llama"), Recorder(records=False)
    made: list[Steps] = []
    begin = recorder.steps
    recorder.steps = lambda *args: made.append(begin(*args)) or made[-1]  # type: ignore[method-assign]
    for _ in range(2):
        decoded(policy, LONG, PROMPTS, recorder=recorder)
        assert made[-1].cache is None


def test_large_caches_are_freed_between_batches(monkeypatch) -> None:
    policy, recorder = policy_of("llama"), Recorder(records=False)
    decoded(policy, LONG, PROMPTS, recorder=recorder)
    monkeypatch.setattr(recording, "KEPT_BYTES", recorder.fixed.nbytes)
    recorder.rest()
    assert recorder.fixed is not None
    monkeypatch.setattr(recording, "KEPT_BYTES", recorder.fixed.nbytes - 1)
    recorder.rest()
    assert recorder.fixed is None
    assert decoded(policy, LONG, PROMPTS, recorder=recorder).tokens.shape[1] > recording.FEWEST
    assert recorder.fixed is not None


def test_longer_texts_are_tried_anew(monkeypatch) -> None:
    decoder = decoder_of(network(ARCHITECTURES["llama"](max_position_embeddings=256), spread=1.0))
    policy, recorder = Policy(decoder, 1.0, ValueHead(decoder.width)).eval(), Recorder(records=False)
    decoded(policy, LONG, PROMPTS, recorder=recorder)
    assert recorder.is_trusted
    assert recorder.fixed.columns == 64
    read = policy.next_token

    def wrong_beyond_64(tokens, mask, cache, positions=None):  # as a model is that counts columns for its window
        step = read(tokens, mask, cache, positions)
        return step._replace(logits=step.logits.flip(1)) if positions is not None and mask.shape[-1] > 64 else step

    longer = [[2] * 60, *PROMPTS[1:]]
    expected = decoded(policy, LONG, longer, with_final_values=True)
    monkeypatch.setattr(policy, "next_token", wrong_beyond_64)
    with pytest.warns(UserWarning, match="logits differ"):
        found = decoded(policy, LONG, longer, with_final_values=True, recorder=recorder)
    assert recorder.is_refused
    same(found, expected)


def test_nothing_of_an_earlier_text_is_read() -> None:
    policy, recorder = policy_of("llama"), Recorder(records=False)
    expected = decoded(policy, LONG, PROMPTS, with_final_values=True)
    decoded(policy, LONG, [[2] * 30, *PROMPTS[1:]], recorder=recorder)
    for layer in recorder.fixed.layers:
        for room in layer.rooms:
            room[:, :, 29:] = torch.nan  # as what half precision cannot hold
    same(decoded(policy, LONG, PROMPTS, with_final_values=True, recorder=recorder), expected)


def test_of_no_rows_none_leaves() -> None:
    policy = policy_of("llama")
    for alive, remaining in ((torch.zeros(0, dtype=torch.bool), 0), (torch.ones(1, dtype=torch.bool), 1)):
        assert Steps(policy, None).staying(alive, remaining) is None
