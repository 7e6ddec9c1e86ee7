"""Rows with preferences in every form that is understood, and in many that are not."""

import gzip
import itertools
import json
import os
import random
import re
from pathlib import Path

import pytest

from lightning_rlhf.data.comparisons import comparison
from lightning_rlhf.data.formats import located_rows

USER, ANSWER, OTHER = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c")))


def read(row, **columns):
    found = comparison(row, "`rows[3]`", columns)
    return found.prompt, found.responses, found.ranks, found.margin


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("a", ("b", "c"), (0, 1), 0.0)),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}, ("a", ("b", "c"), (0, 1), 0.5)),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "2"}, ("a", ("b", "c"), (0, 1), 2.0)),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tie": True}, ("a", ("b", "c"), (0, 0), 0.0)),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tie": "False"}, ("a", ("b", "c"), (0, 1), 0.0)),
        ({"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 3, 1]}, ("a", ("d", "b", "c"), (0, 1, 2), 0.0)),
        ({"prompt": "a", "responses": ["b", "c", "d"], "ranks": [5, 1, 5]}, ("a", ("c", "b", "d"), (0, 1, 1), 0.0)),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [0.1, 7]}, ("a", ("c", "b"), (0, 1), 0.0)),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [3, 3]}, ("a", ("b", "c"), (0, 0), 0.0)),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1], "tie": True}, ("a", ("b", "c"), (0, 0), 0.0)),
        ({"prompt": "a", "responses": '["b", "c"]', "scores": "[1, 2]"}, ("a", ("c", "b"), (0, 1), 0.0)),
    ],
)
@pytest.mark.invariant(33)
def test_pairs_and_rankings(row, expected):
    assert read(row) == expected


def test_a_transcript_is_cut_at_the_last_turn_that_both_have():
    before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": before + " good", "rejected": before + " go\n\nHuman: d\n\nAssistant: e"}
    assert read(row) == (before, (" good", " go\n\nHuman: d\n\nAssistant: e"), (0, 1), 0.0)


def test_responses_that_begin_alike_belong_to_no_prompt():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: I am sure", "rejected": "\n\nHuman: a\n\nAssistant: I am not"}
    assert read(row)[:2] == ("\n\nHuman: a\n\nAssistant:", (" I am sure", " I am not"))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, [USER]),
        ({"prompt": "z", "chosen": [ANSWER], "rejected": [OTHER]}, "z"),
        ({"prompt": [USER, OTHER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER, OTHER, USER]),
    ],
)
def test_chat_messages_end_with_the_response_and_begin_with_the_prompt(row, prompt):
    assert read(row) == (prompt, ("b", "c"), (0, 1), 0.0)


def test_summaries_as_openai_published_them():
    info = {"id": "x", "post": "I {lost} it", "title": "Help", "subreddit": "cats", "site": None, "article": None}
    row = {"info": info, "summaries": [{"text": " s", "policy": "p"}, {"text": " t"}], "choice": 1, "worker": "w"}
    found = comparison(row, "", {})
    assert found.prompt == "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: I {lost} it\n\nTL;DR:"
    assert (found.responses, found.ranks) == ((" t", " s"), (0, 1))
    assert found.metadata == {"worker": "w"}
    news = comparison({**row, "info": {"article": "News.", "title": None, "post": None}}, "", {})
    assert news.prompt == "Article:\n\nNews.\n\nTL;DR:"


def test_other_names_are_given_by_columns_and_the_rest_is_metadata():
    row = {"question": "a", "good": "b", "bad": "c", "prompt": "not this", "source": "book", "label": None}
    found = comparison(row, "", {"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert (found.prompt, found.responses) == ("a", ("b", "c"))
    assert found.metadata == {"source": "book", "prompt": "not this"}


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "metadata"),
    [
        ({**PAIR, "info": "x", "scores": [1, 2], "tie": False}, {"info": "x", "scores": [1, 2]}),
        (
            {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "choice": 3, "chosen": "b"},
            {"choice": 3, "chosen": "b"},
        ),
        ({"info": {"post": "a"}, "summaries": ["b", "c"], "choice": 0, "prompt": "p", "margin": 0.0}, {"prompt": "p"}),
    ],
)
def test_what_another_form_would_read_is_metadata(row, metadata):
    assert comparison(row, "", {}).metadata == metadata


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a"}, "has the keys ['prompt']: it needs 'prompt', 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "has the keys ['chosen', 'prompt', 'rejected']: it needs"),
        ({"chosen": "b", "rejected": "c"}, "`chosen='b'` and `rejected` have no '\\n\\nAssistant:' in common"),
        ({**PAIR, "prompt": 3}, "`prompt=3` must be text, or a list of chat messages"),
        (
            {**PAIR, "prompt": [{"role": "user", "content": 3}]},
            "`prompt=[{'role': 'user', 'content': 3}]` must be text",
        ),
        ({**PAIR, "chosen": 3}, "`rejected='c'` must be text where `chosen` is"),
        ({**PAIR, "chosen": 3, "rejected": 4}, "`chosen=3` must be text, or a list of chat messages"),
        ({**PAIR, "margin": "much"}, "`margin='much'` must be a finite number"),
        ({**PAIR, "margin": float("inf")}, "`margin=inf` must be a finite number"),
        ({**PAIR, "margin": -1}, "`margin=-1` must not be negative"),
        ({**PAIR, "margin": 1, "tie": True}, "`margin=1` needs two responses of which one is better"),
        (
            {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 2, 3], "margin": 1},
            "`margin=1` needs two responses of which one is better",
        ),
        ({**PAIR, "tie": "perhaps"}, "`tie='perhaps'` must be true or false"),
        (
            {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "tie": True},
            "`tie=True` says that neither is better",
        ),
        (
            {"info": {"post": "a"}, "summaries": ["b", "c"], "choice": 0, "tie": "true"},
            "`tie='true'` says that neither is better, and the row that one is: leave it out",
        ),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER, OTHER]}, "must begin as `chosen` does"),
        ({"chosen": [ANSWER, USER], "rejected": [ANSWER, USER]}, "must end with a message of the assistant"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "`rows[3]` has no `prompt`: give one"),
        ({"prompt": "a", "responses": "b", "ranks": [1]}, "`responses='b'` must be a list, or one written as JSON"),
        ({"prompt": "a", "responses": 3, "ranks": [1]}, "`responses=3` must be a list"),
        ({"prompt": "a", "responses": ["b"], "ranks": [1]}, "`responses=['b']` must be two responses or more"),
        ({"prompt": "a", "responses": ["b", 3], "ranks": [1, 2]}, "`responses=3` must be text"),
        ({"prompt": "a", "responses": ["b", "c"]}, "'responses' go with either 'ranks'"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "scores": [1, 2]}, "go with either 'ranks'"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2, 3]}, "`ranks=[1, 2, 3]` must be 2 numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, None]}, "must be a finite number"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, True]}, "`scores=True` must be a finite number"),
        ({"info": {}, "summaries": [], "choice": 0}, "`summaries=[]` must be two, each with a 'text'"),
        ({"info": {}, "summaries": ["b", "c"], "choice": 2}, "`choice=2` must be 0 or 1"),
        (
            {"info": {"post": 3}, "summaries": ["b", "c"], "choice": 0},
            "`info={'post': 3}` must have the text of a 'post'",
        ),
    ],
)
def test_a_row_that_is_not_understood_is_named_with_field_and_value(row, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        read(row)
    assert "`rows[3]`" in str(error.value)


def test_a_field_is_called_what_the_user_calls_it():
    with pytest.raises(ValueError, match=r"`gap=-1` must not be negative"):
        read({**PAIR, "gap": -1}, margin="gap")


def test_ten_thousand_malformed_rows_are_understood_or_named():
    chance = random.Random(0)
    leaves = [None, True, 0, 1, -1, 2.5, float("nan"), float("inf"), 10**400, "", "a", "1", "[1, 2]", '["a"', b"a", {1}]
    keys = ["prompt", "chosen", "rejected", "margin", "tie", "responses", "ranks", "scores", "info", "summaries"]
    keys += ["choice", "role", "content", "text", "post", "title", 3, None]

    def value(depth):
        kind = chance.random()
        if depth == 0 or kind < 0.4:
            return chance.choice(leaves)
        if kind < 0.6:
            return [value(depth - 1) for _ in range(chance.randrange(4))]
        if kind < 0.75:
            return chance.choice([[USER, ANSWER], [USER], [ANSWER], ["a", "b"], [1, 2], [{"text": "a"}, {"text": "b"}]])
        return {chance.choice(keys): value(depth - 1) for _ in range(chance.randrange(4))}

    forms = [["prompt", "chosen", "rejected", "margin", "tie"], ["prompt", "responses", "ranks"]]
    forms += [
        ["prompt", "responses", "scores", "margin"],
        ["info", "summaries", "choice"],
        ["chosen", "rejected"],
        ["prompt", "chosen", "rejected"],
        keys,
    ]
    said, understood = [], 0
    for number in range(10_000):
        form = chance.choice(forms)
        row = {key: value(3) if chance.random() < 0.5 else "a" for key in form if chance.random() < 0.9}
        try:
            found = comparison(row, f"`rows[{number}]`", {})
        except ValueError as error:
            said.append((number, str(error)))
        else:
            understood += 1
            assert len(found.responses) == len(found.ranks) >= 2
            assert all(isinstance(response, str) for response in found.responses)
            assert list(found.ranks) == sorted(found.ranks)
    assert all(f"`rows[{number}]`" in error and len(error) < 600 for number, error in said)
    kinds = {re.sub(r"=.*?` must", " must", error.partition(": ")[2])[:40] for _, error in said}
    assert len(kinds) > 8  # many kinds of error, and
    assert understood > 20  # not all of the rows are so bad


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_row_of_a_file_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    places = [place for place, _ in located_rows(path, "preferences", "prompt")]
    assert places == [f"`preferences={str(path)!r}`: line {line}" for line in (1, 3)]


def test_csv_has_a_header_and_may_break_lines_within_quotes(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected,margin\n"a, b","c\nd",e,0.5\nf,g,h,1\n', encoding="utf-8-sig")
    rows = located_rows(path, "preferences", "prompt")
    assert [row for _, row in rows] == [
        {"prompt": "a, b", "chosen": "c\nd", "rejected": "e", "margin": "0.5"},
        {"prompt": "f", "chosen": "g", "rejected": "h", "margin": "1"},
    ]
    assert [place.rpartition(" ")[2] for place, _ in rows] == ["3", "4"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"a,b\n1,2\n3\n", "line 3 has not as many cells as the header, which has 2"),
        (b"a,b\n1,2,3\n", "line 2 has not as many cells as the header, which has 2"),
        (b'a,b\n1,"2\n', "is no CSV"),
        (b"a,b\n1,\xff\n", "is no CSV"),
    ],
)
def test_a_line_that_is_no_csv_is_named(tmp_path, text, complaint):
    path = tmp_path / "pairs.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        located_rows(path, "preferences", "prompt")


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b"{", b"nope"])
def test_a_line_that_is_no_json_is_named_whatever_it_is(tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"{}\n" + line)
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        located_rows(path, "preferences", "prompt")


def test_parquet_says_what_reads_it_where_that_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(
        ImportError, match=r"`preferences=.*` is read by pyarrow: `pip install lightning-rlhf\[parquet\]`"
    ):
        located_rows(path, "preferences", "prompt")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"`preferences=.*pairs.parquet'` is no Parquet: "):
        located_rows(path, "preferences", "prompt")


def test_parquet_has_a_row_a_row(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": "a", "responses": ["b", "c"], "scores": [1.0, 2.0]}] * 2
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    found = located_rows(tmp_path / "pairs.parquet", "preferences", "prompt")
    assert [row for _, row in found] == rows
    assert [place.rpartition(": ")[2] for place, _ in found] == ["row 0", "row 1"]


@pytest.mark.skipif("LIGHTNING_RLHF_DATA" not in os.environ, reason="HH-RLHF is found through $LIGHTNING_RLHF_DATA")
def test_hh_rlhf_as_it_was_published():
    path = Path(os.environ["LIGHTNING_RLHF_DATA"]) / "hh_harmless.jsonl.gz"
    rows = [comparison(row, place, {}) for place, row in located_rows(path, "preferences", "prompt")]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        originals = [json.loads(line) for line in lines]
    assert len(rows) == len(originals) == 1800
    for row, original in itertools.islice(zip(rows, originals, strict=True), 1800):
        assert [row.prompt + response for response in row.responses] == [original["chosen"], original["rejected"]]
        assert row.prompt.endswith("\n\nAssistant:")
    one_turn = sum("\n\nAssistant:" not in "".join(row.responses) for row in rows)
    assert one_turn > 1700
