import re

import numpy as np
import pytest

from lightning_rlhf import RewardedDataModule, UnpairedPreferenceDataModule
from tests.networks import EOS, PAD, word_tokenizer

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def batch(cls, rows, **arguments):
    data = cls(rows, shuffle=False, **arguments)
    data.tokenizer = word_tokenizer()
    data.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (whole,) = data.train_dataloader()
    return whole


def test_labelled_responses_stand_side_by_side():
    rows = [
        {"prompt": "a b", "response": "c", "label": np.bool_(True), "source": "x"},
        {"prompt": [USER], "completion": "d e", "label": 0},
        {"prompt": "a", "completion": [ANSWER], "label": "true"},
        {"prompt": "a", "completion": "", "label": "0.0"},
    ]
    found = batch(UnpairedPreferenceDataModule, rows)
    assert found.prompt_tokens.tolist() == [[0, 1], [PAD, 0], [PAD, 0], [PAD, 0]]
    assert found.prompt_mask.sum(1).tolist() == [2, 1, 1, 1]
    assert found.response_tokens.tolist() == [[2, EOS, PAD], [3, 4, EOS], [1, EOS, PAD], [EOS, PAD, PAD]]
    assert found.response_mask.sum(1).tolist() == [2, 3, 2, 1]
    assert found.labels.tolist() == [True, False, True, False]
    assert found.metadata == {"source": ["x", None, None, None]}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "id": 3}, [("a", "b", 1.0), ("a", "c", 0.0)]),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "id": 3},
            [("\n\nHuman: a\n\nAssistant:", " b", 1.0), ("\n\nHuman: a\n\nAssistant:", " c", 0.0)],
        ),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2], "id": 3}, [("a", "c", 1.0), ("a", "b", 0.0)]),
        (
            {"info": {"article": "x"}, "summaries": [{"text": "b"}, {"text": "c"}], "choice": 1, "id": 3},
            [("Article:\n\nx\n\nTL;DR:", "c", 1.0), ("Article:\n\nx\n\nTL;DR:", "b", 0.0)],
        ),
    ],
)
def test_a_pair_is_two_labelled_responses(row, expected):
    found = UnpairedPreferenceDataModule([row]).rows
    assert [(judged.prompt, judged.response, judged.judgement) for judged in found] == expected
    assert all(judged.metadata == {"id": 3} for judged in found)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "response": "b"}, "`preferences[1]` has the keys ['prompt', 'response']: it needs 'prompt', "),
        ({"prompt": "a", "response": "b", "label": "good"}, "`preferences[1]`: `label='good'` must be true or false"),
        ({"prompt": "a", "response": "b", "label": 0.5}, "`preferences[1]`: `label=0.5` must be true or false"),
        ({"prompt": "a", "completion": 3, "label": 1}, "`preferences[1]`: `completion=3` must be text, or one message"),
        (
            {"prompt": "a", "completion": [USER], "label": 1},
            "`preferences[1]`: `completion=[{'role': 'user', 'content': 'a'}]` must be text, or one message",
        ),
        ({"prompt": 3, "response": "b", "label": 1}, "`preferences[1]`: `prompt=3` must be text, or a list of chat"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tie": True}, "has 2 responses with the ranks [0, 0]: of two"),
        ({"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 2, 3]}, "has 3 responses with the ranks [0, 1, 2]"),
    ],
)
def test_a_row_that_says_nothing_of_a_response_is_named(row, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        UnpairedPreferenceDataModule([{"prompt": "a", "response": "b", "label": True}, row])


def test_scores_go_with_their_responses():
    rows = [
        {"prompt": "a", "response": "b", "score": 0.5, "source": "x"},
        {"prompt": "a b", "completion": "c d", "reward": "-2"},
    ]
    found = batch(RewardedDataModule, rows)
    assert found.response_tokens.tolist() == [[1, EOS, PAD], [2, 3, EOS]]
    assert found.scores.tolist() == [0.5, -2.0]
    assert found.metadata == {"source": ["x", None]}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"prompt": "a", "response": "b"},
            "`samples[0]` has the keys ['prompt', 'response']: it needs 'prompt', 'resp",
        ),
        ({"prompt": "a", "response": "b", "score": "high"}, "`samples[0]`: `score='high'` must be a finite number"),
        (
            {"prompt": "a", "response": "b", "reward": float("nan")},
            "`samples[0]`: `reward=nan` must be a finite number",
        ),
        ({"prompt": "a", "response": "\ud800", "score": 1}, "`response='\\ud800'` holds half of a surrogate pair"),
    ],
)
def test_a_score_that_is_none_is_named(row, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        RewardedDataModule([row])
