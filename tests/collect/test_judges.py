"""Models as judges, the endpoint's among them, which is a small server in this process."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_rlhf import RewardModel
from lightning_rlhf.collect.answers import Answer
from lightning_rlhf.collect.chat_judge import ChatJudge, reply_of, verdict_of
from lightning_rlhf.collect.judges import Judge, RewardJudge, judge_all, places
from lightning_rlhf.collect.store import Store
from lightning_rlhf.collect.tasks import read_tasks

CHAT = [{"role": "user", "content": "Hi"}]


def store_of(tmp_path, rows):
    store = Store(tmp_path / "x.sqlite")
    store.add(read_tasks(rows).tasks)
    return store


class Shortest(Judge):
    name = "shortest"

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.chunks = []

    def answers(self, comparisons):
        self.chunks.append(len(comparisons))
        for prompt, responses in comparisons:
            if prompt == self.fails_at:
                raise RuntimeError("out of paper")
            yield Answer("preference", tuple(places([-len(text) for text in responses])))


ROWS = [{"prompt": f"p{n}", "responses": ["long", "ab", "cd"]} for n in range(5)]


def test_a_judge_answers_all_tasks_once(tmp_path):
    store, judge = store_of(tmp_path, ROWS), Shortest()
    assert judge_all(store, judge, 2) == 5
    assert judge.chunks == [2, 2, 1]
    assert [row["ranks"] for row in store.preferences()] == [[2, 1, 1]] * 5
    assert judge_all(store, judge) == 0


def test_a_judge_that_fails_says_where_and_goes_on_from_there(tmp_path):
    store = store_of(tmp_path, ROWS)
    with pytest.raises(ValueError, match="the judge 'shortest' failed on task 4, 3 of 5 are answered: out of paper"):
        judge_all(store, Shortest("p3"), 10)
    assert len(list(store.preferences())) == 3
    with pytest.raises(ValueError, match=r"on task 4, .*: out of paper \(or on a later one, up to 5: it got them at"):
        judge_all(store, Shortest("p3"), 2)
    with pytest.raises(ValueError, match="on task 4, .*: out of paper$"):
        judge_all(store, Shortest("p3"), 1)
    assert judge_all(store, Shortest()) == 2
    with pytest.raises(ValueError, match="`batch_size=0` must be at least 1"):
        judge_all(store, Shortest(), 0)


@pytest.mark.parametrize(
    ("scores", "within", "expected"),
    [
        ([1.0, 3.0, 2.0], 0.0, [3, 1, 2]),
        ([1.0, 1.0], 0.0, [1, 1]),
        ([0.0, 0.4, 1.0], 0.5, [2, 2, 1]),
        ([0.0, 0.4, 0.8], 0.5, [1, 1, 1]),  # each is close to the next
    ],
)
def test_places_are_those_of_scores_and_close_ones_share(scores, within, expected):
    assert places(scores, within) == expected


def test_a_reward_model_prefers_what_it_scores_higher(tmp_path, monkeypatch):
    def scored(self, prompts, responses):
        assert len(set(map(type, prompts))) == 1  # as a reward model requires
        return [float(len(text)) for text in responses]

    monkeypatch.setattr(RewardModel, "__call__", scored)
    store = store_of(
        tmp_path,
        [
            {"prompt": "p", "responses": ["abc", "a", "ab"]},
            {"prompt": CHAT, "responses": ["a", "b"]},
            {"prompt": "q", "responses": ["a", "ab"]},
        ],
    )
    judge = RewardJudge("folders/critic")
    assert judge.name == "critic"
    assert judge_all(store, judge) == 3
    ranking, tie, pair = store.preferences()
    assert pair["chosen"] == "ab"
    assert ranking["ranks"] == [1, 3, 2]
    assert ranking["comment"] == "scores 3, 1, 2"
    assert tie["tie"] is True
    with pytest.raises(ValueError, match="`tie_within=-1` must not be negative"):
        RewardJudge("x", tie_within=-1)


def test_a_score_that_is_no_number_is_no_preference(tmp_path, monkeypatch):
    monkeypatch.setattr(RewardModel, "__call__", lambda self, prompts, responses: [1.0, float("nan")])
    store = store_of(tmp_path, [{"prompt": "p", "responses": ["ab", "c"]}])
    assert judge_all(store, RewardJudge("critic")) == 1
    assert list(store.preferences()) == []
    assert judge_all(store, RewardJudge("critic")) == 0, "it goes on with the others, and not with this one again"
    ((verdict, comment),) = store.database.rows("SELECT verdict, comment FROM answers")
    assert (verdict, comment) == ("skip", "scores 1, nan")


def test_a_reward_model_goes_to_the_gpu_that_there_is(monkeypatch):
    for is_there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda is_there=is_there: is_there)
        assert RewardJudge("critic").model.device.type == device


# --- over HTTP --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def endpoint(reply):
    """An endpoint that says to each request what a function makes of its body and number; or gives a status."""
    bodies, paths = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append((body, self.headers.get("Authorization")))
            paths.append(self.path)
            said = reply(body["messages"][-1]["content"], len(bodies))
            self.send_response(said if isinstance(said, int) else 200)
            text = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies, paths
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def between(question, name):
    return question.split(f"[The beginning of the {name}]\n")[1].split(f"\n[The end of the {name}]")[0]


def longer(question, number):
    a, b = (len(between(question, f"response {mark}")) for mark in "AB")
    return f"[[A]] or [[B]]? I say [[{'C' if a == b else 'A' if a > b else 'B'}]]"


def test_an_endpoint_is_asked_in_both_orders_and_what_it_says_twice_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "secret")
    rows = [{"prompt": CHAT, "responses": ["a", "ab"]}, {"prompt": "p", "responses": ["ab", "abc", "a"]}]
    store = store_of(tmp_path, rows)
    with endpoint(longer) as (url, bodies, paths):
        judge = ChatJudge("critic", url + "/", options={"max_tokens": 7}, token_env="KEY")
        assert judge_all(store, judge) == 2
    pair, ranking = store.preferences()
    assert (pair["chosen"], pair["annotator"]) == ("ab", "critic")
    assert ranking["ranks"] == [2, 1, 3]
    assert "1 before 2: [[A]] or [[B]]? I say [[B]]" in pair["comment"]
    assert set(paths) == {"/v1/chat/completions"}
    assert len(bodies) == 2 + 6
    asked = sorted((between(b["messages"][1]["content"], "response A"), b["temperature"]) for b, _ in bodies)
    assert asked == [("a", 0)] * 3 + [("ab", 0)] * 3 + [("abc", 0)] * 2
    assert {key for _, key in bodies} == {"Bearer secret"}
    assert "user: Hi" in json.dumps([body for body, _ in bodies])
    assert all((body["model"], body["max_tokens"]) == ("critic", 7) for body, _ in bodies)


@pytest.mark.parametrize("habit", ["A", "B"])
def test_a_judge_that_prefers_a_place_says_nothing(tmp_path, habit):
    store = store_of(tmp_path, [{"prompt": "p", "responses": ["a", "ab"]}])
    with endpoint(lambda question, number: f"[[{habit}]]") as (url, _, _):
        judge_all(store, ChatJudge("critic", url))
    (row,) = store.preferences()
    assert row["tie"] is True


def test_what_passes_is_tried_again_and_what_does_not_ends_with_the_task(tmp_path):
    store = store_of(tmp_path, [{"prompt": "p", "responses": ["a", "ab"]}])
    with endpoint(lambda question, number: 503 if number < 4 else longer(question, number)) as (url, bodies, _):
        assert judge_all(store, ChatJudge("critic", url, backoff=0.001, concurrency=1)) == 1
    assert len(bodies) == 5
    with endpoint(lambda question, number: 401) as (url, bodies, _):
        with pytest.raises(
            ValueError, match=r"the judge 'other' failed on task 1, .* answered 401 .*responses 0 and 1"
        ):
            judge_all(store, ChatJudge("critic", url, name="other", concurrency=1))
        assert len(bodies) == 1


def test_a_verdict_that_cannot_be_read_is_a_skip_with_what_was_said(tmp_path):
    store = store_of(tmp_path, [{"prompt": "p", "responses": ["a", "ab"]}])
    with endpoint(lambda question, number: "I would rather not.") as (url, _, _):
        judge_all(store, ChatJudge("critic", url))
    assert list(store.preferences()) == []
    (row,) = store.database.rows("SELECT verdict, comment FROM answers")
    assert row["verdict"] == "skip"
    assert "I would rather not." in row["comment"]


def test_verdicts_and_replies_are_found_or_missed():
    assert [verdict_of(text) for text in ("[[A]]", "[[A]] no, [[C]]", "A", "")] == [1, 0, None, None]
    assert reply_of({"choices": [{"message": {"content": None}}]}) == ""
    with pytest.raises(ValueError, match="no chat completion: {'error'"):
        reply_of({"error": "no such model"})


def test_instructions_without_the_verdicts_are_refused():
    with pytest.raises(ValueError, match=r"`instructions` must say that \[\[A\]\]"):
        ChatJudge("critic", "http://localhost", instructions="Which is better, [[A]] or [[B]]?")
