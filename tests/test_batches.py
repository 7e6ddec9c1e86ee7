from dataclasses import fields, replace

import pytest
import torch

from lightning_rlhf.batches import Experience, ImitationBatch, Scores
from tests.networks import written

PAD = 23


def experience(prompts, responses):
    """Every number tells which row and token it belongs to."""
    rollouts = written(prompts, responses)
    rows, length = rollouts.response_mask.shape
    marks = 100.0 * torch.arange(rows)[:, None] + torch.arange(length)
    rollouts = replace(
        rollouts,
        prompts=[f"prompt {i}" for i in range(rows)],
        responses=[f"response {i}" for i in range(rows)],
        metadata={"row": list(range(rows))},
        old_logprobs=marks,
        values=marks + 10,
        final_values=torch.arange(rows) + 0.5,
    )
    scores = Scores(total=1.0 * torch.arange(rows), by_name={"one": 2.0 * torch.arange(rows)}, token_scores=marks + 20)
    return Experience.from_rollouts(rollouts, scores=scores, advantages=marks + 30)


PROMPTS, RESPONSES = [[1], [2, 3, 4], [5, 6]], [[1, 2, 3, 4], [5], [6, 7]]


@pytest.mark.invariant(28)
def test_selected_rows_keep_all_that_is_theirs_in_the_order_asked_for():
    chosen = experience(PROMPTS, RESPONSES).select(torch.tensor([2, 0, 2]))
    assert len(chosen) == 3
    assert chosen.prompts == ["prompt 2", "prompt 0", "prompt 2"]
    assert chosen.responses == ["response 2", "response 0", "response 2"]
    assert chosen.metadata == {"row": [2, 0, 2]}
    assert chosen.scores.total.tolist() == [2.0, 0.0, 2.0]
    assert chosen.scores.by_name["one"].tolist() == [4.0, 0.0, 4.0]
    assert chosen.scores.token_scores[:, 1].tolist() == [221.0, 21.0, 221.0]
    assert chosen.prompt_tokens.tolist() == [[PAD, 5, 6], [PAD, PAD, 1], [PAD, 5, 6]]
    assert chosen.response_mask.sum(1).tolist() == [2, 4, 2]
    assert chosen.old_logprobs[:, 1].tolist() == [201.0, 1.0, 201.0]
    assert chosen.final_values.tolist() == [2.5, 0.5, 2.5]
    assert chosen.ref_logprobs is None


def test_trimming_takes_off_what_is_padding_in_every_row_and_nothing_else():
    whole = experience(PROMPTS, RESPONSES).select(torch.tensor([0, 2]))
    trimmed = whole.trimmed()
    assert trimmed.prompt_tokens.tolist() == [[PAD, 1], [5, 6]]
    assert trimmed.prompt_mask.tolist() == [[False, True], [True, True]]
    assert trimmed.response_tokens.tolist() == [[1, 2, 3, 4], [6, 7, PAD, PAD]]
    short = experience(PROMPTS, RESPONSES).select(torch.tensor([2])).trimmed()
    for name in ("response_tokens", "response_mask", "sampled_mask", "old_logprobs", "values", "advantages"):
        assert getattr(short, name).shape == (1, 2), name
    assert short.values.tolist() == [[210.0, 211.0]]
    assert short.scores.token_scores.tolist() == [[220.0, 221.0]]
    assert short.scores.total.tolist() == [2.0]
    assert short.final_values.tolist() == [2.5]


def test_trimming_what_has_no_padding_changes_nothing():
    whole = experience([[1, 2]], [[3, 4]])
    trimmed = whole.trimmed()
    for field in fields(whole):
        value = getattr(whole, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(trimmed, field.name)), field.name
    assert torch.equal(whole.scores.token_scores, trimmed.scores.token_scores)


def test_rows_of_imitation_are_counted():
    tokens = torch.zeros(3, 2, dtype=torch.long)
    batch = ImitationBatch(
        prompt_tokens=tokens, prompt_mask=tokens.bool(), response_tokens=tokens, response_mask=tokens.bool()
    )
    assert len(batch) == 3
    assert len(batch.select(torch.tensor([0]))) == 1


def test_a_batch_moves_as_a_whole_and_keeps_what_is_no_tensor():
    moved = experience(PROMPTS, RESPONSES).to("meta")
    tensors = [getattr(moved, field.name) for field in fields(moved)]
    tensors += [moved.scores.total, moved.scores.token_scores, *moved.scores.by_name.values()]
    assert {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)} == {"meta"}
    assert moved.metadata == {"row": [0, 1, 2]}
    assert moved.responses == ["response 0", "response 1", "response 2"]
