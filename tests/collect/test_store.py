import json
import math
import random
import sqlite3
import subprocess
import sys
import threading

import pytest

from lightning_rlhf import PreferenceDataModule
from lightning_rlhf.collect.answers import Answer, ConflictError
from lightning_rlhf.collect.progress import counts, progress
from lightning_rlhf.collect.store import Store
from lightning_rlhf.collect.tasks import Task, read_tasks

FIRST, SECOND, TIE = ((1, 2), (2, 1), (1, 1))


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def rows(count=3, responses=("x", "y")):
    return [{"prompt": f"p{n}", "responses": [*responses], "topic": n} for n in range(count)]


def store_of(path, tasks=3, names="ab", **more):
    store = Store(path, **{"clock": Clock(), "chance": random.Random(0), **more})
    store.add(read_tasks(tasks if isinstance(tasks, list) else rows(tasks)).tasks)
    for name in names:
        store.join(name)
    return store


def prefers(store, who, response, **more):
    """The next task of somebody, who finds this response better wherever it stands."""
    given = store.next(who)
    ranks = tuple(1 if text == response else 2 for text in given.responses)
    store.answer(who, given.task, given.shown, Answer("preference", ranks, **more))
    return given


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.sqlite"


def test_a_task_is_given_until_it_is_answered_and_then_the_next(path):
    store = store_of(path, 2)
    given = store.next("a")
    assert store.next("a") == given
    assert (given.prompt, sorted(given.responses)) == ("p0", ["x", "y"])
    store.answer("a", given.task, given.shown, Answer("preference", FIRST))
    assert prefers(store, "a", "x").prompt == "p1"
    assert store.next("a") is None


def test_tasks_of_one_answer_are_given_to_one_and_of_two_to_two(path):
    store = store_of(path, 2)
    assert {store.next("a").prompt, store.next("b").prompt} == {"p0", "p1"}
    store.join("c")
    assert store.next("c") is None

    both = store_of(path.with_name("both.sqlite"), 1, "abc", answers_per_task=2)
    assert both.next("a").task == both.next("b").task
    assert both.next("c") is None
    prefers(both, "a", "x")
    assert both.next("c") is None
    prefers(both, "b", "x")
    assert both.next("c") is None
    assert counts(both) == (1, 1, 0)


def test_what_was_begun_comes_before_what_was_not(path):
    store = store_of(path, 3, answers_per_task=2)
    assert prefers(store, "a", "x").prompt == "p0"
    assert store.next("a").prompt == "p1"
    assert store.next("b").prompt == "p0"


def test_the_order_is_drawn_and_the_answer_is_of_the_response_and_not_of_its_place(path):
    store = store_of(path, 40, "a")
    shown = [prefers(store, "a", "y").shown for _ in range(40)]
    assert 10 < shown.count((0, 1)) < 30
    assert [(row["chosen"], row["rejected"]) for row in store.preferences()] == [("y", "x")] * 40
    stored = [json.loads(row["shown"]) for row in store.database.rows("SELECT shown FROM answers ORDER BY id")]
    assert stored == [list(order) for order in shown]


def test_a_lease_that_ran_out_lets_others_have_the_task_and_a_late_answer_counts(path):
    store = store_of(path, 1, lease_seconds=60)
    given = store.next("a")
    store.clock.now += 59
    assert store.next("b") is None
    store.clock.now += 2
    other = store.next("b")
    assert other.task == given.task
    store.answer("a", given.task, given.shown, Answer("preference", FIRST))
    store.answer("b", other.task, other.shown, Answer("preference", FIRST))
    assert len(list(store.preferences())) == 2


def test_who_asks_again_after_the_lease_finds_what_others_left(path):
    store = store_of(path, 2, lease_seconds=60)
    given = store.next("a")
    store.clock.now += 61
    prefers(store, "b", "x")
    assert store.next("a").prompt == "p1"
    with pytest.raises(ConflictError, match="no longer yours"):
        store.answer("a", given.task, given.shown, Answer("preference", FIRST))


def test_asking_keeps_the_lease(path):
    store = store_of(path, 1, lease_seconds=60)
    store.next("a")
    store.clock.now += 50
    store.next("a")
    store.clock.now += 50
    assert store.next("b") is None


def test_the_same_answer_twice_is_one_and_another_is_refused(path):
    store = store_of(path, 1, answers_per_task=2)
    given = store.next("a")
    for _ in range(2):
        store.answer("a", given.task, given.shown, Answer("preference", FIRST, grade=2, comment="why"))
    with pytest.raises(ConflictError, match="undo that answer to change it"):
        store.answer("a", given.task, given.shown, Answer("preference", SECOND))
    with pytest.raises(ConflictError, match="undo that answer"):
        store.answer("a", given.task, given.shown[::-1], Answer("preference", FIRST, grade=2, comment="why"))
    with pytest.raises(ConflictError, match="undo that answer"):
        store.answer("a", given.task, (7, 8), Answer("preference", FIRST, grade=2, comment="why"))
    assert len(list(store.preferences())) == 1


def test_an_answer_to_what_was_not_given_or_not_so_shown_is_refused(path):
    store = store_of(path, 2)
    given = store.next("a")
    for who, task, shown in [
        ("b", given.task, given.shown),
        ("a", given.task + 1, given.shown),
        ("a", given.task, given.shown[::-1]),
        ("a", given.task, (0, 0)),
        ("a", 99, (0, 1)),
    ]:
        with pytest.raises(ConflictError, match="no longer yours"):
            store.answer(who, task, shown, Answer("preference", FIRST))
    assert list(store.preferences()) == []


def test_the_database_itself_refuses_a_second_answer(path):
    store = store_of(path, 1)
    prefers(store, "a", "x")
    columns = "task, annotator, verdict, ranks, shown, answered"
    with pytest.raises(sqlite3.IntegrityError):
        store.database.execute(f"INSERT INTO answers ({columns}) SELECT {columns} FROM answers")


def test_a_skip_leaves_the_task_to_others_and_a_flag_takes_it_from_all(path):
    store = store_of(path, 2)
    for verdict, next_of_b in [("skip", "p0"), ("flag", "p1")]:
        given = store.next("a")
        store.answer("a", given.task, given.shown, Answer(verdict, comment="!"))
        del given
        if verdict == "skip":
            assert store.next("b").prompt == next_of_b
            prefers(store, "b", "x")
    assert store.next("a") is None
    assert store.next("b") is None
    assert counts(store) == (2, 1, 1)


def test_a_flag_takes_back_what_others_said_and_have(path):
    store = store_of(path, 1, "abc", answers_per_task=3)
    prefers(store, "a", "x")
    store.next("c")
    given = store.next("b")
    store.answer("b", given.task, given.shown, Answer("flag"))
    assert store.next("c") is None
    assert list(store.preferences()) == []
    store.undo("b")
    assert len(list(store.preferences())) == 1
    assert store.next("c") is not None


def test_undo_gives_the_task_back_as_it_was_shown_with_what_was_said(path):
    store = store_of(path, 3)
    first = prefers(store, "a", "x", grade=3, comment="because")
    second = store.next("a")
    again = store.undo("a")
    assert (again.task, again.shown) == (first.task, first.shown)
    assert again.previous == Answer("preference", again.previous.ranks, 3, "because")
    assert first.responses[again.previous.ranks.index(1)] == "x"
    assert list(store.preferences()) == []
    assert store.next("a") == again
    prefers(store, "a", "y")
    assert [row["chosen"] for row in store.preferences()] == ["y"]
    assert store.next("a").task == second.task
    taken_back = store.database.rows("SELECT ranks FROM answers WHERE undone IS NOT NULL")
    assert len(taken_back) == 1  # it is kept


def test_undo_goes_back_answer_by_answer_and_never_to_those_of_others(path):
    store = store_of(path, 3)
    tasks = [prefers(store, "a", "x").task for _ in range(2)]
    prefers(store, "b", "x")
    assert [store.undo("a").task, store.undo("a").task] == tasks[::-1]
    assert store.undo("a") is None
    assert len(list(store.preferences())) == 1
    prefers(store, "a", "x")
    assert store.next("a").task == tasks[1]
    assert store.undo("a").task == tasks[0]
    # What was taken back and is not held any more waits for whoever comes.
    assert store.next("b").task == tasks[1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer("yes"), "`verdict='yes'` must be"),
        (Answer("preference"), "`ranks=None` must be 2 whole numbers"),
        (Answer("preference", (1,)), "must be 2 whole numbers"),
        (Answer("preference", (1, 2.0)), "must be 2 whole numbers"),
        (Answer("preference", (True, 2)), "must be 2 whole numbers"),
        (Answer("preference", 5), "`ranks=5` must be 2 whole numbers"),
        (Answer("skip", (1, 2)), "`verdict='skip'` goes without `ranks`"),
        (Answer("preference", (1, 2), grade=4), "`grade=4` must be a whole number from 1 to 3"),
        (Answer("preference", (1, 1), grade=1), "`grade=1` needs two responses, one of which is better"),
        (Answer("skip", grade=1), "`grade=1` needs two responses"),
        (Answer("skip", comment=3), "`comment` must be text"),
        (Answer("skip", comment="x" * 10_001), "of at most 10000 characters"),
    ],
)
def test_an_answer_without_sense_is_refused_with_its_field(path, answer, message):
    store = store_of(path, 1)
    given = store.next("a")
    with pytest.raises(ValueError, match=message):
        store.answer("a", given.task, given.shown, answer)
    assert store.next("a") == given


@pytest.mark.parametrize("argument", ["answers_per_task", "lease_seconds"])
def test_a_store_needs_positive_numbers(path, argument):
    with pytest.raises(ValueError, match=f"`{argument}=0` must be"):
        Store(path, **{argument: 0})


def test_the_same_tasks_again_are_not_added_and_a_new_one_is(path):
    store = store_of(path, 2)
    assert store.add(read_tasks(rows(3)).tasks) == 1
    assert counts(store)[0] == 3
    pairs = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("xy", "yx", "xy")]  # of people who disagree
    assert store.add(read_tasks(pairs).tasks) == 1


def test_what_is_not_sqlite_or_not_ours_is_refused(path, tmp_path):
    path.write_text("no database at all, whatever its name says")
    with pytest.raises(ValueError, match="is no SQLite database"):
        Store(path)
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE x (y)")
    other.close()
    with pytest.raises(ValueError, match="of another kind, or version"):
        Store(tmp_path / "other.sqlite")
    with pytest.raises(ValueError, match="cannot be opened"):
        Store(tmp_path / "no folder" / "x.sqlite")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Store(tmp_path / "none.sqlite", must_exist=True)


def test_a_sqlite_that_cannot_read_json_says_so(path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 2))
    with pytest.raises(ImportError, match=r"is too old, and must be 3\.38 at least"):
        Store(path)


def test_annotators_and_judges_have_names_of_their_own(path):
    store = store_of(path)
    store.join("a")
    store.join("j", is_judge=True)
    for name, is_judge, whose in [("a", True, "person"), ("j", False, "judge")]:
        with pytest.raises(ValueError, match=f"`name='{name}'` is that of a {whose}"):
            store.join(name, is_judge)


def test_a_judge_needs_no_lease_and_takes_no_task_from_people(path):
    store = store_of(path, 1)
    store.join("j", is_judge=True)
    given = store.next("a")
    (number,) = store.unanswered("j")
    for ranks in (SECOND, FIRST):  # the second time it is too late
        store.judge("j", number, Answer("preference", ranks))
    assert store.unanswered("j") == []
    assert [(row["chosen"], row["annotator"]) for row in store.preferences()] == [("y", "j")]
    assert counts(store) == (1, 0, 0)
    assert store.next("a") == given
    assert list(store.preferences(["a"])) == []


def test_many_threads_lose_nothing_and_double_nothing(path):
    names = [f"n{i}" for i in range(12)]
    store = store_of(path, 60, names, answers_per_task=2, clock=lambda: 0.0, chance=None)
    acknowledged = []

    def work(name):
        while (given := store.next(name)) is not None:
            for _ in range(2):
                store.answer(name, given.task, given.shown, Answer("preference", FIRST))
            acknowledged.append((given.task, name))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = [tuple(row) for row in store.database.rows("SELECT task, annotator FROM answers")]
    assert sorted(stored) == sorted(acknowledged)
    assert len(set(stored)) == len(stored) == 120
    assert [row["given"] for row in store.database.rows("SELECT given FROM tasks")] == [2] * 60


def _lease_what_is_not_there(database):
    with database.transaction():
        database.execute("PRAGMA defer_foreign_keys = ON")  # only COMMIT sees that it is wrong
        database.execute("INSERT INTO leases VALUES (99, 'a', '[]', 0, 0)")


def test_what_could_not_be_written_is_not_there_and_the_next_answer_is(path):
    store = store_of(path, 2)
    given = store.next("a")
    fields = ("a", given.task, given.shown, Answer("preference", FIRST, comment="x" * 10_000))
    store.database.execute("PRAGMA max_page_count = 1")  # the disk is full
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.answer(*fields)
    store.database.execute("PRAGMA max_page_count = 1000000")
    with pytest.raises(sqlite3.IntegrityError):
        _lease_what_is_not_there(store.database)
    assert store.database.rows("SELECT 1 FROM leases WHERE task = 99") == []
    store.answer(*fields)
    assert len(list(store.preferences())) == 1


KILLED = """
import os, signal, sys
from lightning_rlhf.collect.answers import Answer
from lightning_rlhf.collect.store import Store
store = Store(sys.argv[1])
given = store.next("a")
store.answer("a", given.task, given.shown, Answer("preference", (1, 2)))
print(given.task, flush=True)
with store.database.transaction():
    store.database.execute("DELETE FROM answers")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # a process that imports the package
def test_what_was_answered_survives_a_kill_and_what_was_half_written_does_not(path):
    store = store_of(path, 2)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [row["task"] for row in store.preferences()] == [int(done.stdout)]


# --- what is read back ------------------------------------------------------------------------------------------------

STRANGE = "\x00 \N{GRINNING FACE} </script> \\u0041 \n\"'"


def test_rows_are_those_of_the_data_module_whatever_they_hold(path):
    chat = [{"role": "user", "content": STRANGE}]
    tasks = [
        {"prompt": STRANGE, "responses": ["x" + STRANGE, "y"], "topic": {"deep": [None, STRANGE]}, "number": 2**60},
        {"prompt": chat, "responses": ["x", "y"]},
        {"prompt": "tie", "responses": ["x", "y"]},
        {"prompt": "three", "responses": ["x", "y", "z"]},
    ]
    store = store_of(path, tasks, "a")
    for ranks, grade in [("best", 2), ("best", None), (TIE, None), ((2, 1, 1), None)]:
        given = store.next("a")
        if ranks == "best":
            ranks = tuple(1 if text == "y" else 2 for text in given.responses)
        store.answer("a", given.task, given.shown, Answer("preference", ranks, grade, "why" if grade else None))
    first, second, third, fourth = store.preferences()
    assert first == {
        "prompt": STRANGE, "chosen": "y", "rejected": "x" + STRANGE, "topic": {"deep": [None, STRANGE]},
        "number": 2**60, "grade": 2, "comment": "why", "annotator": "a", "task": 1,
    }  # fmt: skip
    assert second["prompt"] == chat
    assert third["tie"] is True
    assert fourth["responses"] == ["x", "y", "z"]
    by_place = dict(zip(given.responses, ranks, strict=True))
    assert fourth["ranks"] == [by_place[text] for text in "xyz"]

    data = PreferenceDataModule([first, second, third, fourth], columns={"margin": "grade"})
    assert [row.margin for row in data.rows] == [2.0, 0.0, 0.0, 0.0]
    assert [row.ranks for row in data.rows] == [(0, 1), (0, 1), (0, 0), (0, 0, 1)]


def test_the_data_module_reads_the_database_itself(path):
    store = store_of(path, 3, "a")
    for response in ("x", "y"):
        prefers(store, "a", response)
    data = PreferenceDataModule(str(path))  # while the server has it open
    assert [row.responses for row in data.rows] == [("x", "y"), ("y", "x")]
    assert data.metadata_keys == ["annotator", "task", "topic"]


def test_a_database_without_preferences_is_refused_by_name(path, tmp_path):
    store_of(path, 1)
    with pytest.raises(ValueError, match="`preferences` is empty"):
        PreferenceDataModule(str(path))
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    with pytest.raises(ValueError, match="is no database of `lightning-rlhf collect`"):
        PreferenceDataModule(str(tmp_path / "text.sqlite"))


def test_sources_go_with_their_responses(path):
    store = Store(path)
    store.add([Task("p", ("x", "y"), ("old", "new"), {}, "k"), Task("q", ("x", "y", "z"), ("o", "n", "m"), {}, "l")])
    store.join("a")
    prefers(store, "a", "y")
    given = store.next("a")
    store.answer("a", given.task, given.shown, Answer("preference", (1, 2, 3)))
    pair, ranking = store.preferences()
    assert pair["sources"] == ["new", "old"]
    assert ranking["sources"] == ["o", "n", "m"]


def test_progress_counts_and_agreement_are_those_of_what_was_said(path):
    store = store_of(path, 4, "ab", answers_per_task=2)
    said = {"a": ["x", "x", "y", "x"], "b": ["x", "y", "y", "x"]}
    for name, responses in said.items():
        for response in responses:
            store.clock.now += 4
            given = store.next(name)
            store.clock.now += 6
            ranks = tuple(1 if text == response else 2 for text in given.responses)
            store.answer(name, given.task, given.shown, Answer("preference", ranks))
    state = progress(store)
    assert (state.tasks, state.done, state.flagged, state.units) == (4, 4, 0, 4)
    assert [(work.name, work.preferences, work.seconds) for work in state.work] == [("a", 4, 6.0), ("b", 4, 6.0)]
    ((one, other, kappa, units),) = state.kappas
    assert (one, other, units) == ("a", "b", 4)
    assert 0 < kappa < 1
    assert 0 < state.alpha < 1
    store.undo("b")
    assert progress(store).units == 3


def test_the_left_is_where_it_was_shown(path):
    store = store_of(path, 6, "a")
    left = [prefers(store, "a", "x").shown[0] == 0 for _ in range(6)]
    assert 0 < sum(left) < 6
    (work,) = progress(store).work
    assert work.left == pytest.approx(sum(left) / 6)
    assert math.isnan(progress(store_of(path.with_name("empty.sqlite"))).alpha)
