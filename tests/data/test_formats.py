import gzip
import json
from collections import UserDict
from pathlib import Path

import pytest

from lightning_rlhf.data.formats import is_chat, located_rows

CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
ITEMS = ["a b", CHAT, {"prompt": "c", "answer": "d", "level": 3}]
ROWS = [{"prompt": "a b"}, {"prompt": CHAT}, {"prompt": "c", "answer": "d", "level": 3}]


def read_rows(source, argument, text_key):
    return [row for _, row in located_rows(source, argument, text_key)]


def test_lists_become_rows_and_what_is_no_dict_is_the_text():
    assert read_rows(ITEMS, "prompts", "prompt") == ROWS
    assert read_rows(["a"], "rows", "text") == [{"text": "a"}]


@pytest.mark.parametrize("source", [tuple(ITEMS), iter(ITEMS), (item for item in ITEMS)])
def test_rows_may_come_from_any_iterable(source):
    assert read_rows(source, "prompts", "prompt") == ROWS


def test_rows_may_be_mappings_of_any_kind_and_are_copied():
    row = {"prompt": "a"}
    rows = read_rows([UserDict(row), row], "prompts", "prompt")
    assert rows == [row, row]
    rows[1]["prompt"] = "b"
    assert row == {"prompt": "a"}


def test_equal_rows_are_all_kept():
    assert len(read_rows(["a", "a", "a"], "prompts", "prompt")) == 3


@pytest.mark.parametrize("ending", ["rows.jsonl", "rows.jsonl.gz", "rows.txt"])
@pytest.mark.parametrize("as_path", [True, False])
def test_a_file_has_a_row_a_line(tmp_path, ending, as_path):
    path = tmp_path / ending
    text = "\n".join(json.dumps(item) for item in ITEMS) + "\n\n  \n" + json.dumps("grüße")
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    rows = read_rows(path if as_path else str(path), "prompts", "prompt")
    assert rows == [*ROWS, {"prompt": "grüße"}]


def test_a_missing_file_is_named_with_the_folder_that_was_looked_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^`prompts='no.jsonl'`: there is no such file .looked in {tmp_path}"):
        read_rows("no.jsonl", "prompts", "prompt")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_rows(tmp_path, "prompts", "prompt")


def test_a_line_that_is_no_json_is_named_by_its_number_in_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('"a"\n\n{"prompt": "b"\n"c"\n')
    with pytest.raises(ValueError, match=f"^`rows='{path}'`: line 3 is no JSON: .*delimiter"):
        read_rows(path, "rows", "text")


@pytest.mark.parametrize("source", [[], (), iter([])])
def test_no_rows_at_all_is_an_error(source):
    with pytest.raises(ValueError, match="^`prompts` is empty: give at least one row"):
        read_rows(source, "prompts", "prompt")


def test_an_empty_file_is_one_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="^`prompts` is empty"):
        read_rows(Path(tmp_path / "rows.jsonl"), "prompts", "prompt")


@pytest.mark.parametrize("source", [None, 3, {"prompt": "a"}])
def test_what_holds_no_rows_is_an_error_that_quotes_it(source):
    with pytest.raises(TypeError, match=f"^`prompts={source!r}` must be a list of rows, or the path of a JSONL file"):
        read_rows(source, "prompts", "prompt")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (CHAT, True),
        ([{"role": "user", "content": "a", "name": "b"}], True),
        ("a", False),
        ([], False),
        ([{"role": "user"}], False),
        (["a"], False),
        ({"role": "user", "content": "a"}, False),
    ],
)
def test_chat_messages_have_a_role_and_content_each(prompt, expected):
    assert is_chat(prompt) is expected
