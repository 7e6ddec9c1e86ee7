"""The page as a browser asks for it, without one."""

import json
import random
import re

import pytest
from starlette.testclient import TestClient

from lightning_rlhf.collect.access import Access
from lightning_rlhf.collect.server import Page, Server
from lightning_rlhf.collect.store import Store
from lightning_rlhf.collect.tasks import read_tasks

SCRIPT = "<script>alert(1)</script>"
ROWS = [
    {"prompt": [{"role": "user", "content": "Hi"}], "responses": [SCRIPT, "y"]},
    {"prompt": "Line\n  two", "responses": ["\x01", "y\n\nz"]},
    {"prompt": "three", "responses": ["x", "y", "z"]},
]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "x.sqlite", chance=random.Random(0))
    store.add(read_tasks(ROWS).tasks)
    return store


def client_of(store, name=None, token="", page=None, hosts=None, **access):
    app = Server(store, Access(store.database, **access), page, agreement_seconds=0.0).app(hosts)
    client = TestClient(app, base_url="http://localhost")
    if name is not None:
        assert client.post("/api/enter", json={"name": name, "token": token}).status_code == 200
    return client


def ask(client, action, status=200, **fields):
    response = client.post(f"/api/{action}", json=fields)
    assert response.status_code == status, response.text
    return response.json()


def prefers(client, state, response, **more):
    task = state["task"]
    ranks = [1 if text == response else 2 for text in task["responses"]]
    return ask(client, "answer", task=task["task"], order=task["shown"], verdict="preference", ranks=ranks, **more)


def test_a_task_is_shown_answered_and_undone(store):
    client = client_of(store, "ann")
    state = ask(client, "next")
    assert state["task"]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert sorted(state["task"]["responses"]) == [SCRIPT, "y"]
    assert state["progress"] == {"tasks": 3, "done": 0, "flagged": 0, "yours": 0, "alpha": None, "units": 0}
    after = prefers(client, state, "y", grade=3, comment=" why ")
    assert after["task"]["prompt"] == [{"role": None, "content": "Line\n  two"}]
    assert "\x01" in after["task"]["responses"]
    assert (after["progress"]["done"], after["progress"]["yours"]) == (1, 1)
    back = ask(client, "undo")
    assert back["task"]["task"] == state["task"]["task"]
    assert back["task"]["previous"] == {
        "verdict": "preference", "grade": 3, "comment": "why",
        "ranks": [1 if text == "y" else 2 for text in back["task"]["responses"]],
    }  # fmt: skip
    assert ask(client, "undo", 409)["error"] == "There is no answer to undo."


def test_two_annotators_agree_and_the_page_says_so(tmp_path, store):
    store.answers_per_task = 2
    clients = [client_of(store, name) for name in ("ann", "bob")]
    for client in clients:
        state = ask(client, "next")
        for response in ("y", "y\n\nz"):
            state = prefers(client, state, response)
        task = state["task"]
        state = ask(client, "answer", task=task["task"], order=task["shown"], verdict="preference",
                    ranks=[" xyz".index(text) for text in task["responses"]])  # fmt: skip
        assert state["task"] is None
    assert state["progress"] == {"tasks": 3, "done": 3, "flagged": 0, "yours": 3, "alpha": 1.0, "units": 5}
    page = clients[0].get("/progress").text
    for text in ("3 of 3", "1.00", "ann", "bob", "Cohen"):
        assert text in page


def test_nothing_is_shown_to_strangers(store):
    client = client_of(store)
    assert 'id="enter"' in client.get("/").text
    for action in ("next", "answer", "undo"):
        assert "Say who you are" in ask(client, action, 401)["error"]
    assert client.get("/progress", follow_redirects=False).status_code == 303
    client.cookies.set("annotator", "YW5u.00")
    assert ask(client, "next", 401)


def test_a_token_lets_in_and_another_does_not(store, monkeypatch):
    monkeypatch.setattr("asyncio.sleep", _at_once)
    client = client_of(store, host="0.0.0.0", annotators={"ann": "ann's secret"})
    assert 'name="token"' in client.get("/").text
    assert 'name="name"' not in client.get("/").text
    assert ask(client, "enter", 403, token="guess")["error"] == "This token is not known."
    assert ask(client, "enter", token="ann's secret") == {"name": "ann"}
    assert ask(client, "next")["task"]
    assert "ann" in client.get("/").text
    ask(client, "leave")
    assert ask(client, "next", 401)


async def _at_once(seconds):
    assert seconds > 0


def test_names_that_are_no_annotators_or_none_are_refused(store, monkeypatch):
    monkeypatch.setattr("asyncio.sleep", _at_once)
    client = client_of(store, annotators=["ann"])
    assert "<option>ann</option>" in client.get("/").text
    assert "not among the annotators" in ask(client, "enter", 403, name="eve")["error"]
    assert "`name=''`" in ask(client_of(store), "enter", 400)["error"]
    store.join("judge", is_judge=True)
    assert "is that of a judge" in ask(client_of(store), "enter", 400, name="judge")["error"]


@pytest.mark.parametrize("path", ["/", "/progress", "/static/page.css", "/nowhere", "/api/next"])
def test_every_answer_forbids_what_comes_from_elsewhere(store, path):
    headers = client_of(store, "ann").get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_nothing_is_fetched_from_elsewhere_and_no_script_stands_in_a_page(store):
    client = client_of(store, "ann")
    texts = [client.get(path).text for path in ("/", "/progress", "/static/page.css", "/static/compare.js")]
    texts += [client_of(store).get(path).text for path in ("/", "/static/enter.js")]
    for text in texts:
        assert re.findall(r"(?:https?:|[\"'(])//", text) == []
        assert "innerHTML" not in text
        assert " style=" not in text
        assert text.count("<script") == text.count("<script src=")


def test_names_and_what_the_page_says_are_escaped(store):
    page = Page(title="<b>t</b>", instructions=SCRIPT)
    client = client_of(store, SCRIPT, page=page)
    for path in ("/", "/progress"):
        text = client.get(path).text
        assert SCRIPT not in text
        assert "&lt;script&gt;" in text
    assert "&lt;b&gt;t" in client.get("/").text


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"task": "1"}, 400, "`task='1'` must be a number"),
        ({"task": 2**64, "order": []}, 400, "must be a number"),
        ({"task": 1, "order": "01"}, 400, "`order='01'` a list"),
        ({"task": 1, "order": [0, 1]}, 400, "`verdict=''`"),
        ({"task": 1, "order": [0, 1], "verdict": []}, 400, "`verdict="),
        ({"task": 1, "order": [0, 1], "verdict": "preference", "ranks": {}}, 400, "`ranks={}`"),
        ({"task": 1, "order": [0, 1], "verdict": "preference", "ranks": [1, "2"]}, 400, "`ranks=(1, '2')`"),
        ({"task": 1, "order": [0, 1], "verdict": "preference", "ranks": [1, 2], "grade": "1"}, 400, "`grade='1'`"),
        ({"task": 1, "order": [7, {}], "verdict": "preference", "ranks": [1, 2]}, 409, "no longer yours"),
        ({"task": 3, "order": [0, 1, 2], "verdict": "preference", "ranks": [1, 2, 3]}, 409, "no longer yours"),
    ],
)
def test_answers_without_sense_are_told_what_is_wrong(store, fields, status, message):
    client = client_of(store, "ann")
    given = ask(client, "next")
    assert message in ask(client, "answer", status, **fields)["error"]
    assert ask(client, "next") == given


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{}", "text/plain", "must be JSON"),  # as a form of another site could send
        (b"{", "application/json", "is no JSON"),
        (b"[" * 100_000, "application/json", "is no JSON"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'"\xff"', "application/json", "is no JSON"),
        (b" " * 200_000, "application/json", "at most 160000 bytes"),
    ],
)
def test_what_is_no_json_object_is_refused(store, body, kind, message):
    client = client_of(store, "ann")
    response = client.post("/api/next", content=body, headers={"content-type": kind})
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_a_comment_that_is_no_text_is_kept_as_far_as_it_is(store):
    client = client_of(store, "ann")
    state = ask(client, "next")
    task = state["task"]
    fields = {"task": task["task"], "order": task["shown"], "verdict": "skip", "comment": "a\ud800b"}
    json_type = {"content-type": "application/json"}
    assert client.post("/api/answer", content=json.dumps(fields), headers=json_type).status_code == 200
    assert ask(client, "undo")["task"]["previous"]["comment"] == "a?b"


def test_a_page_elsewhere_that_is_led_here_reads_nothing(store):
    client = client_of(store, hosts=["localhost", "127.0.0.1"])
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "127.0.0.1:8000"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_the_cookie_is_no_scripts_and_no_other_sites(store):
    response = client_of(store).post("/api/enter", json={"name": "ann"})
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_who_wrote_a_response_is_not_told(store):
    state = ask(client_of(store, "ann"), "next")
    assert set(state["task"]) == {"task", "prompt", "responses", "shown", "previous"}


def test_agreement_is_computed_no_more_often_than_asked_for(store, monkeypatch):
    app = Server(store, Access(store.database), agreement_seconds=1e6).app()
    client = TestClient(app, base_url="http://localhost")
    ask(client, "enter", name="ann")
    ask(client, "next")
    monkeypatch.setattr("lightning_rlhf.collect.server.progress", None)
    assert ask(client, "next")["progress"]["units"] == 0


def test_choose_is_one_of_two():
    with pytest.raises(ValueError, match="`choose='worst'` must be 'rank' or 'best'"):
        Page(choose="worst")
