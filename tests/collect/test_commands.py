"""`lightning-rlhf collect` as a user meets it."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_rlhf import PreferenceDataModule
from lightning_rlhf.cli import main
from lightning_rlhf.collect.answers import Answer
from lightning_rlhf.collect.judges import Judge
from lightning_rlhf.collect.sampling import Writers
from lightning_rlhf.collect.store import Store
from lightning_rlhf.generation.sampling import Sampling
from tests.networks import network, tiny_gpt2, word_tokenizer

ROWS = [{"prompt": "a", "responses": ["b", "c c"]}, {"prompt": "b", "responses": ["b", "c c"]}]


class Longest(Judge):
    """Named by its class path."""

    name = "longest"

    def answers(self, comparisons):
        for _, responses in comparisons:
            longest = max(map(len, responses))
            yield Answer("preference", tuple(1 if len(text) == longest else 2 for text in responses))


@pytest.fixture(autouse=True)
def _in_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(("old", "new")):
        network(tiny_gpt2(), seed).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return folder


def said(capsys, *words):
    main(["collect", *words])
    return capsys.readouterr().out


def complaint(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["collect", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_tasks_are_added_judged_counted_and_exported(capsys):
    assert "2 tasks are new in x.sqlite, which has 2." in said(
        capsys, "add", "--database", "x.sqlite", "--prompts", "rows.jsonl"
    )
    assert "0 tasks are new in x.sqlite, which has 2." in said(
        capsys, "add", "--database", "x.sqlite", "--prompts", "rows.jsonl"
    )
    out = said(capsys, "judge", "--database", "x.sqlite", "--judge", f"{__name__}.Longest")
    assert "longest has judged 2 tasks." in out
    assert "longest (judge)" in out
    assert "0 of 2 tasks are done, 0 flagged." in said(capsys, "progress", "--database", "x.sqlite")
    out = said(capsys, "export", "--database", "x.sqlite", "--output", "out.jsonl.gz", "--annotators", '["longest"]')
    assert "2 preferences are in out.jsonl.gz." in out
    assert [row.responses for row in PreferenceDataModule("out.jsonl.gz").rows] == [("c c", "b")] * 2


def test_a_yaml_says_it_all_and_the_command_line_overrides_it(capsys):
    rows = [*ROWS, {"prompt": "c", "responses": ["b", "b"]}]
    config = {"database": "x.sqlite", "prompts": rows, "columns": None}
    Path("collect.yaml").write_text(yaml.safe_dump(config))
    out = said(capsys, "add", "--config", "collect.yaml", "--database", "y.sqlite")
    assert "2 tasks are new in y.sqlite" in out
    assert "1 rows are left out: one response only, or several that are alike." in out


def test_two_policies_write_in_turns_and_only_what_is_not_there(policies, capsys, monkeypatch):
    words = ["add", "--database", "x.sqlite", "--prompts", '["a b", "c", "d"]', "--responses_per_prompt", "3",
             "--policies", json.dumps([str(policies / name) for name in ("old", "new")]),
             "--sampling.max_new_tokens", "6", "--device", "cpu"]  # fmt: skip
    assert "3 tasks are new" in said(capsys, *words)
    store = Store("x.sqlite")
    for row in store.database.rows("SELECT responses, sources FROM tasks"):
        responses, sources = json.loads(row["responses"]), json.loads(row["sources"])
        assert len(set(responses)) == len(responses) == len(sources)
        assert sources in (["old", "new", "old"], ["old", "new"])
        assert all(set("".join(text.split())) <= set("abcdefghijklmnopqrstuv") for text in responses)
    monkeypatch.setattr(Writers, "_written", None)  # nobody writes a second time
    assert "0 tasks are new" in said(capsys, *words)


def test_what_is_written_depends_on_the_seed_and_not_on_the_batch_or_on_what_was_there(policies):
    prompts = [("a b", {}), ("c", {}), ("d e f", {})]

    def written(prompts=prompts, **more):
        writers = Writers([str(policies / "old")], 2, Sampling(max_new_tokens=5), device="cpu", **more)
        return [task and task.responses for task in writers.tasks(prompts)]

    assert written() == written(batch_size=1)
    assert written()[1:] == written(prompts[1:])
    assert written() != written(seed=1)


def test_a_policy_that_writes_alone_is_loaded_once(policies, monkeypatch):
    writers = Writers([str(policies / "old")], 2, Sampling(max_new_tokens=2), device="cpu")
    writers.tasks([("a", {})])
    monkeypatch.setattr("lightning_rlhf.collect.sampling.SFTModule", None)
    assert len(writers.tasks([("b", {})])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"responses_per_prompt": 1}, "`responses_per_prompt=1` must lie between 2 and 9"),
        ({"responses_per_prompt": 10}, "`responses_per_prompt=10` must lie"),
        ({"policies": []}, r"`policies=\[\]` must be one or more"),
        ({"policies": ["a", "b", "c"]}, "at most `responses_per_prompt=2`"),
        ({"batch_size": 0}, "`batch_size=0` must be at least 1"),
        ({"sampling": Sampling(temperature=0)}, "`sampling.temperature=0` lets a policy write the same response again"),
    ],
)
def test_writers_that_could_write_no_choice_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Writers(**{"policies": ["a"], **arguments})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "--database", "x.sqlite"], "`prompts` is missing"),
        (["add", "--database", "x.db", "--prompts", "rows.jsonl"], "`database='x.db'` must end with .sqlite"),
        (["add", "--database", "x.sqlite", "--prompts", '["a"]'], "give `policies` that write some"),
        (["add", "--database", "x.sqlite", "--prompts", "none.jsonl"], "there is no such file"),
        (["add", "--database", "x.sqlite", "--promts", "x"], "did you mean `prompts`?"),
        (["serve", "--database", "x.sqlite"], "`database='x.sqlite'` has no tasks: give `prompts`"),
        (["serve", "--database", "x.sqlite", "--host", "0.0.0.0"], "set a `token`"),
        (["serve", "--database", "x.sqlite", "--port", "70000"], "`port=70000` cannot be listened on"),
        (["serve", "--database", "x.sqlite", "--host", "192.0.2.1", "--token", "12345678"], "listened on"),
        (["serve", "--database", "x.sqlite", "--choose", "worst"], "choose"),
        (["serve", "--database", "x.sqlite", "--lease_minutes", "0"], "`lease_minutes=0.0` must be positive"),
        (["export", "--database", "x.sqlite", "--output", "o.jsonl"], "there is no such file"),
        (["progress", "--database", "x.sqlite"], "there is no such file"),
        (["judge", "--database", "x.sqlite"], "`judge` is missing"),
        (
            ["judge", "--database", "x.sqlite", "--judge", "ChatJudge", "--judge.model", "m", "--judge.url", "no"],
            "`url='no/chat/completions'` must begin with http",
        ),
        (["add", "--database", "x.sqlite", "--sampling.temperature", "-1"], "`temperature=-1.0` must be positive"),
        (["serve", "--database", "x.sqlite", "--annotators", '{"ann": "short"}'], "`annotators['ann']` must have at"),
        (["serve", "--database", "x.sqlite", "--annotators", '["a", "b"]', "--host", "0.0.0.0"], "set a `token`"),
        (
            [
                "judge",
                "--database",
                "x.sqlite",
                "--prompts",
                "rows.jsonl",
                "--judge",
                "ChatJudge",
                "--judge.model",
                "m",
                "--judge.url",
                "http://127.0.0.1:1/v1",
                "--judge.token_env",
                "NO_SUCH_KEY",
                "--judge.retries",
                "0",
            ],
            "`token_env='NO_SUCH_KEY'` is no environment variable",
        ),
        (
            [
                "judge",
                "--database",
                "x.sqlite",
                "--prompts",
                "rows.jsonl",
                "--judge",
                "RewardJudge",
                "--judge.model",
                "no",
                "--judge.tie_within",
                "0.5",
            ],
            "the judge 'no' failed on task 1, 0 of 2 are answered",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(capsys, words, message):
    error = complaint(capsys, *words)
    assert message in error
    assert "Traceback" not in error


def test_an_annotator_who_is_not_known_is_not_exported(capsys):
    said(capsys, "judge", "--database", "x.sqlite", "--prompts", "rows.jsonl", "--judge", f"{__name__}.Longest")
    words = ["export", "--database", "x.sqlite", "--output", "out.jsonl", "--annotators", '["eve"]']
    assert "`annotators` names 'eve', who must be one of 'longest'." in complaint(capsys, *words)
    assert not Path("out.jsonl").exists()


def test_the_page_says_what_installs_it_where_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "`pip install lightning-rlhf[collect]`" in complaint(capsys, "serve", "--database", "x.sqlite")


def test_the_help_lists_it(capsys):
    for words, expected in [
        ([], "collect"),
        (["collect"], "Serves the page"),
        (["collect", "serve"], "--lease_minutes"),
    ]:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert expected in capsys.readouterr().out
