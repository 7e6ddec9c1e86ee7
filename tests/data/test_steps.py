"""Rows that were judged step by step: their forms, and what is no row."""

import json

import pytest

from lightning_rlhf import StepDataModule
from lightning_rlhf.models.texts import step_ends, step_ids
from tests.networks import word_tokenizer


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("one\ntwo\n", ["one", "\ntwo"]),
        ("one\n\ntwo", ["one", "\n\ntwo"]),
        ("\n one", ["\n one"]),
        ("one", ["one"]),
        ("\n\n", []),
        ("", []),
    ],
)
def test_where_steps_end(response, expected):
    ends = step_ends(response, "\n")
    assert [response[a:b] for a, b in zip([0, *ends], ends, strict=False)] == expected


def test_a_separator_of_several_letters_is_not_found_across_itself():
    assert step_ends("a##b###c", "##") == [1, 4, 8]


def batch_of(rows, separator=None, **arguments):
    data = StepDataModule(rows, shuffle=False, **arguments)
    data.tokenizer, data.separator = word_tokenizer(), separator
    (batch,) = data.train_dataloader()
    return batch


def test_forms_columns_and_metadata():
    rows = [
        {"question": "a", "steps": ["b c", "d"], "marks": [0.5, None], "id": 1},
        {"question": "a b", "completions": ["e"], "marks": "[true]"},
    ]
    batch = batch_of(rows, columns={"prompt": "question", "labels": "marks"})
    assert batch.response_mask.sum(1).tolist() == [3, 1]
    assert batch.step_mask.tolist() == [[False, True, False], [True, False, False]]
    assert batch.labels.tolist() == [[0.0, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert batch.metadata == {"id": [1, None]}
    assert batch.prompt_mask.tolist() == [[False, True], [True, True]]


def test_of_a_response_that_is_cut_the_steps_that_are_left_count():
    rows = [{"prompt": "a", "steps": ["b c", "d", "e f"], "labels": [1, 0.5, 1]}]
    batch = batch_of(rows, max_response_length=4, truncate={"response": "right"})
    assert batch.response_mask.sum().item() == 4
    assert batch.step_mask.tolist() == [[False, True, True, False]]
    assert batch.labels.tolist() == [[0.0, 1.0, 0.5, 0.0]]


def test_rows_from_a_file_are_named_by_line_and_field(tmp_path):
    path = tmp_path / "steps.jsonl"
    good = {"prompt": "a", "steps": ["b"], "labels": [1]}
    path.write_text("\n".join(json.dumps(row) for row in [good, {**good, "labels": ["good"]}]))
    with pytest.raises(ValueError, match=r"steps.jsonl'`: line 2: `labels='good'` must be a finite number"):
        StepDataModule(str(path))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"labels": None},
            r"has the keys .*: it needs 'prompt', 'labels', and 'steps' or 'response'",
        ),
        ({"steps": None}, r"has the keys .*: it needs"),
        ({"labels": [None]}, r"`labels=\[None\]` must say something of one step at least"),
        ({"labels": [1, 2]}, r"`labels=\[1, 2\]` must be 1 labels, one for each step"),
        ({"labels": 1}, "`labels=1` must be a list"),
        ({"labels": [float("nan")]}, "`labels=nan` must be a finite number"),
        ({"steps": "b"}, "`steps='b'` must be a list, or one written as JSON"),
        ({"steps": [" "]}, "`steps=' '` must be steps that hold text"),
        ({"steps": [3]}, "`steps=3` must be text"),
        ({"prompt": None}, "has no `prompt`: give one"),
        ({"steps": None, "response": "b", "ends": ["x"]}, "`ends='x'` must be a finite number"),
    ],
)
def test_what_is_no_row_is_refused_by_place_field_and_value(row, complaint):
    row = {"prompt": "a", "steps": ["b"], "labels": [1], **row}
    with pytest.raises(ValueError, match=rf"`steps\[0\]`:? {complaint}"):
        StepDataModule([row])


def test_columns_are_known_keys():
    with pytest.raises(
        ValueError, match="`columns` names 'label', which must be one of 'prompt', 'steps', 'completions'"
    ):
        StepDataModule([{"prompt": "a", "steps": ["b"], "labels": [1]}], columns={"label": "x"})


def test_a_step_without_a_token_is_refused():
    with pytest.raises(ValueError, match="the step 'b' has no token: join it to another one"):
        step_ids("ab", [1, 2], None, lambda text, **options: {"input_ids": [1] * (text == "a")})
