import json
import random

import pytest

from lightning_rlhf.collect.tasks import read_tasks
from lightning_rlhf.collect.turns import turns

CHAT = [{"role": "user", "content": "Hi"}]


def found(rows, **more):
    return [(task.prompt, list(task.responses), task.metadata) for task in read_tasks(rows, **more).tasks]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "responses": ["x", "y"]},
        {"prompt": "p", "responses": '["x", "y"]'},  # as in a cell of a CSV file
        {"prompt": "p", "responses": ["x", "y"], "scores": [1, 5]},  # the preference is not looked at
        {"prompt": "p", "chosen": "x", "rejected": "y", "tie": False},
        {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}],
         "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "y"}]},
    ],
)  # fmt: skip
def test_rows_in_any_form_become_tasks(row):
    ((prompt, responses, metadata),) = found([row | {"topic": "t"}])
    assert prompt in ("p", [{"role": "user", "content": "p"}])
    assert responses == ["x", "y"]
    assert metadata == {"topic": "t"}


def test_transcripts_lose_what_they_have_in_common():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
    assert found([row]) == [("\n\nHuman: Hi\n\nAssistant:", [" Hello", " What?"], {})]


def test_rows_with_the_same_prompt_and_a_response_each_are_one_task():
    rows = [{"prompt": p, "response": r} for p, r in [("a", "1"), (CHAT, "2"), ("a", "3"), (CHAT, "4"), ("a", "1")]]
    read = read_tasks(rows)
    assert [(task.prompt, task.responses) for task in read.tasks] == [("a", ("1", "3")), (CHAT, ("2", "4"))]
    assert found([{"prompt": "a", "completion": text} for text in "xy"]) == [("a", ["x", "y"], {})]  # as others have it


def test_of_rows_that_make_one_task_the_metadata_is_what_they_have_in_common():
    rows = [{"prompt": "a", "response": str(n), "topic": "t", "score": n, **({"odd": 1} if n else {})} for n in (0, 1)]
    assert found(rows) == [("a", ["0", "1"], {"topic": "t"})]


def test_so_it_is_where_whole_tasks_or_prompts_are_there_twice():
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y", "worker": "ann", "topic": "t"},
        {"prompt": "p", "chosen": "y", "rejected": "x", "worker": "bob", "topic": "t"},
        {"prompt": "q", "worker": "ann", "topic": "t"},
        {"prompt": "q", "worker": "bob", "topic": "t"},
    ]
    read = read_tasks(rows)
    ((task,), (prompt,)) = read.tasks, read.prompts
    assert (task.responses, task.metadata) == (("x", "y"), {"topic": "t"})
    assert prompt == ("q", {"topic": "t"})


def test_what_exported_answers_say_of_themselves_is_no_metadata_and_no_name_for_it():
    answer = {"prompt": "p", "chosen": "x", "rejected": "y", "annotator": "a", "task": 3, "grade": 1, "topic": "t"}
    assert found([answer]) == [("p", ["x", "y"], {"topic": "t"})]


def test_prompts_without_responses_are_told_apart_and_what_has_no_choice_is_counted():
    read = read_tasks(["a", CHAT, {"prompt": "b", "id": 7}, {"prompt": "c", "responses": ["x", "x"]}])
    assert read.prompts == [("a", {}), (CHAT, {}), ("b", {"id": 7})]
    assert read.tasks == []
    assert read.dropped.total() == 1


def test_columns_have_the_names_that_one_says():
    rows = [{"question": "p", "a": "x", "b": "y"}]
    assert found(rows, columns={"prompt": "question", "chosen": "a", "rejected": "b"}) == [("p", ["x", "y"], {})]
    with pytest.raises(ValueError, match="`text=3` must be text"):
        read_tasks([{"prompt": "p", "text": 3}], columns={"response": "text"})
    with pytest.raises(ValueError, match="`columns` names 'query', which must be one of 'prompt'"):
        read_tasks(rows, columns={"query": "question"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "responses": "x"}, "`responses='x'` must be a list"),
        ({"prompt": "p", "responses": ["x"]}, "must be two responses or more"),
        ({"prompt": "p", "responses": ["x", 3]}, "`responses=3` must be text"),
        ({"prompt": "p", "responses": [str(n) for n in range(10)]}, "`responses` are 10, and at most 9"),
        ({"prompt": 3}, "`prompt=3` must be text"),
        ({"text": "x"}, "`prompt=None` must be text, .* A row has 'prompt' and 'responses'"),
        ({"prompt": "p", "response": 3}, "`response=3` must be text"),
        ({"prompt": "p", "task": "maths"}, "`task='maths'` has a name that exported answers need"),
        ({"prompt": "p", "responses": ["x", "y"], "sources": ["a", "b"]}, "`sources=.* has a name that"),
        ({"prompt": "p", "chosen": "x", "rejected": 3}, "`rejected=3`"),
        ({"prompt": "p", "score": float("nan")}, "cannot be written as JSON"),
    ],
)
@pytest.mark.invariant(39)
def test_a_malformed_row_names_file_line_and_field(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl'`: line 2.*{message}"):
        read_tasks(str(path))


def test_too_many_rows_with_one_prompt_name_it():
    with pytest.raises(ValueError, match="`prompts` has 10 responses to the prompt 'p', and at most 9"):
        read_tasks([{"prompt": "p", "response": str(n)} for n in range(10)])


def test_ten_thousand_bad_rows_give_messages_and_nothing_else():
    chance = random.Random(0)
    keys = ["prompt", "response", "responses", "chosen", "rejected", "ranks", "scores", "summaries", "info", "choice",
            "tie", "margin", "x"]  # fmt: skip
    values = [None, 1, -0.5, True, "", "[", '["a"]', "t", [], ["a", "b"], [1], {}, {"text": "a"}, CHAT, "\ud800", [[]]]
    messages = []
    for _ in range(10_000):
        row = {chance.choice(keys): chance.choice(values) for _ in range(chance.randint(0, 5))}
        try:
            read_tasks([row])
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 5000
    assert [message for message in messages if "`prompts[0]`" not in message] == []


def test_turns_are_those_of_a_chat_or_a_transcript():
    assert turns(CHAT) == [{"role": "user", "content": "Hi"}]
    assert turns("\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:") == [
        {"role": "Human", "content": "a\n\nb"},
        {"role": "Assistant", "content": "c"},
        {"role": "Human", "content": "d"},
    ]
    for begin in ("", "\n", "\n\n\n"):
        assert turns(begin + "Human: a") == [{"role": "Human", "content": "a"}]
    assert turns("What is\n\nHuman: nature?") == [{"role": None, "content": "What is\n\nHuman: nature?"}]
    assert (
        turns([{"role": "user", "content": [{"type": "image"}]}])[0]["content"] == '[\n  {\n    "type": "image"\n  }\n]'
    )
