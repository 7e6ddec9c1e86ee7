"""Endpoints: a server of this process, which is slow, fails, or answers what it should not."""

import json
import pickle
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_rlhf import GRPOModule, HTTPReward, PPOModule
from lightning_rlhf.modules.arguments import plain_arguments
from lightning_rlhf.rewards.combine import CombinedReward
from lightning_rlhf.rewards.endpoint import Endpoint
from lightning_rlhf.rewards.functions import RewardFunction
from tests.networks import word_tokenizer, written
from tests.training import fit, module_of

QUICK = {"backoff": 1e-3, "max_backoff": 1e-3}


class Server(ThreadingHTTPServer):
    """Answers by a function from a request's number and body to a status, an answer and headers."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.bodies, self.headers, self.busy, self.busiest = [], [], 0, 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, *args):
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        status, answer, headers = server.answer(number, body)
        with server.lock:
            server.busy -= 1
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serving(answer):
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def lengths(number, body):
    return 200, {"scores": [float(len(response)) for response in body["responses"]]}, {}


def rollouts(count):
    batch = written([[0]] * count, [[1]] * count)
    batch.responses = [f"r{'x' * i}" for i in range(count)]
    batch.metadata = {"answer": [10 * i for i in range(count)]}
    return batch


def scored(reward, count=5):
    return RewardFunction(reward)(rollouts(count), word_tokenizer())


def test_responses_are_sent_in_batches_and_scores_come_back_in_order():
    def slow_at_first(number, body):
        time.sleep(0.1 * (number == 0))
        return lengths(number, body)

    with serving(slow_at_first) as server:
        assert scored(HTTPReward(server.url, batch_size=2)) == [1.0, 2.0, 3.0, 4.0, 5.0]
    sent = sorted(server.bodies, key=lambda body: len(body["responses"][0]))
    assert [body["responses"] for body in sent] == [["r", "rx"], ["rxx", "rxxx"], ["rxxxx"]]
    assert all(body["prompts"] == rollouts(5).prompts[: len(body["prompts"])] for body in sent)
    assert [set(body) for body in sent] == [{"prompts", "responses"}] * 3


def test_so_many_requests_are_under_way_and_no_more():
    def slow(number, body):
        time.sleep(0.05)
        return lengths(number, body)

    with serving(slow) as server:
        assert len(scored(HTTPReward(server.url, batch_size=1, concurrency=3), 9)) == 9
        assert server.busiest == 3


def test_a_bare_list_none_and_dense_scores_are_answers_too():
    with serving(lambda number, body: (200, [1, None], {})) as server:
        first, second = scored(HTTPReward(server.url), 2)
        assert (first, second != second) == (1.0, True)
    with serving(lambda number, body: (200, {"scores": [[0.5], [2]]}, {})) as server:
        assert scored(HTTPReward(server.url), 2) == [[0.5], [2.0]]


def chat_body(prompts, responses, answer):
    return {"query": [prompt + response for prompt, response in zip(prompts, responses, strict=True)], "gold": answer}


def rewards_of(answer):
    return answer["rewards"]


def test_another_protocol_metadata_headers_and_a_token(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")

    def answer(number, body):
        return 200, {"rewards": body["gold"]}, {}

    name = "tests.rewards.test_http"
    options = {"headers": {"X-Kind": "test"}, "token_env": "JUDGE_TOKEN"}
    with serving(answer) as server:
        reward = HTTPReward(server.url, metadata=["answer"], write=chat_body, read=f"{name}.rewards_of", **options)
        assert scored(reward, 3) == [0.0, 10.0, 20.0]
    assert server.bodies[0]["query"][1].endswith("rx")
    (headers,) = server.headers
    assert (headers["X-Kind"], headers["Authorization"]) == ("test", "Bearer secret")
    stored = reward.plain()
    assert "secret" not in json.dumps(stored)
    assert stored["init_args"]["write"] == f"{name}.chat_body"
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(RuntimeError, match="`token_env='JUDGE_TOKEN'` is no environment variable: set it"):
        scored(reward)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status):
    def answer(number, body):
        return (status, "busy", {}) if number < 2 else lengths(number, body)

    with serving(answer) as server:
        assert scored(HTTPReward(server.url, retries=2, **QUICK), 2) == [1.0, 2.0]
        assert len(server.bodies) == 3


def test_it_waits_as_long_as_it_is_told():
    def answer(number, body):
        return (429, "", {"Retry-After": "60"}) if number == 0 else lengths(number, body)

    with serving(answer) as server:
        start = time.perf_counter()
        scored(HTTPReward(server.url, max_backoff=0.3, backoff=1e-3))
        assert 0.3 <= time.perf_counter() - start < 3.0


def test_the_longest_wait_doubles_up_to_a_limit():
    endpoint = Endpoint("http://localhost", backoff=0.5, max_backoff=3.0)
    assert [endpoint.longest_wait(attempt) for attempt in (1, 2, 3, 4, 2000)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def at_the_third(status, answer):
    """Fails where the third response is."""
    return lambda number, body: (status, answer, {}) if "rxx" in body["responses"] else lengths(number, body)


THIRD = r"on response 2 'rxx'"


@pytest.mark.invariant(39)
@pytest.mark.parametrize(
    ("answer", "complaint", "attempts"),
    [
        (at_the_third(400, "no such model"), f"answered 400 Bad Request .*no such model.* {THIRD}, after 1 attempt", 1),
        (at_the_third(302, ""), f"answered 302 Found .* {THIRD}, after 1 attempt", 1),
        (at_the_third(503, "busy"), f"answered 503 Service Unavailable .*busy.* {THIRD}, after 3 attempts", 3),
        (at_the_third(200, b"<html>"), f"answered what is no JSON .'<html>'. {THIRD}, after 1 attempt", 1),
        (at_the_third(200, {"scores": []}), rf"answered .* {THIRD}: it must give a list of 1 scores", 1),
        (at_the_third(200, {"score": [1]}), rf"answered .* {THIRD}: it must give a list of 1 scores", 1),
        (at_the_third(200, 1.0), rf"answered '1.0' {THIRD}: it must give a list of 1 scores", 1),
        (at_the_third(200, {"scores": ["good"]}), r"gave 'good' for response 2 \('rxx'\): it must be a number", 1),
        (at_the_third(200, b'{"scores": [NaN]}'), r"gave nan for response 2 \('rxx'\): it must be finite", 1),
    ],
    ids=["refused", "elsewhere", "always busy", "no JSON", "too few", "no scores", "a number", "a word", "nan"],
)
def test_a_failure_names_endpoint_and_sample(answer, complaint, attempts):
    with serving(answer) as server:
        reward = HTTPReward(server.url, batch_size=1, concurrency=1, retries=2, name="judge", **QUICK)
        with pytest.raises((RuntimeError, ValueError), match=f"`reward` 'judge' .*{complaint}"):
            scored(reward)
        tries = [body for body in server.bodies if body["responses"] == ["rxx"]]
        assert len(tries) == attempts


def test_one_that_does_not_answer_is_not_waited_for():
    def hangs(number, body):
        time.sleep(0.5 * ("rxx" in body["responses"]))
        return lengths(number, body)

    with serving(hangs) as server:
        reward = HTTPReward(server.url, batch_size=2, timeout=0.1, retries=1, **QUICK)
        complaint = (
            r"did not answer within `timeout=0.1` seconds on responses 2 to 3, the first of them 'rxx', after 2 at"
        )
        with pytest.raises(RuntimeError, match=complaint):
            scored(reward)


def test_one_that_is_not_there_is_an_error_once_all_attempts_are_made():
    with serving(lengths) as server:
        url = server.url
    with pytest.raises(RuntimeError, match=r"`url='http://127.*'` failed \(.*on responses 0 to 4, .* after 3 attempts"):
        scored(HTTPReward(url, retries=2, **QUICK))


def test_the_first_failure_ends_the_other_requests():
    def answer(number, body):
        time.sleep(0.02)
        return 400, "", {}

    with serving(answer) as server:
        with pytest.raises(RuntimeError, match="answered 400"):
            scored(HTTPReward(server.url, batch_size=1, concurrency=2), 50)
        assert len(server.bodies) < 10


def test_metadata_that_is_missing_or_no_json_is_refused():
    reward = HTTPReward("http://127.0.0.1:1/", metadata=["gold"])
    with pytest.raises(RuntimeError, match="`metadata` names 'gold', which is no key of the prompts' rows"):
        scored(reward)
    batch = rollouts(2)
    batch.metadata = {"gold": [1, {2}]}
    with pytest.raises(RuntimeError, match="what is to be sent on responses 0 to 1.* cannot be written as JSON: .*set"):
        RewardFunction(reward)(batch, None)


@pytest.mark.parametrize(
    ("build", "error", "complaint"),
    [
        (
            lambda: HTTPReward("localhost:8000"),
            ValueError,
            "`url='localhost:8000'` must begin with http:// or https://",
        ),
        (lambda: HTTPReward("http://"), ValueError, "`url='http://'` must begin with .* and name a host"),
        (lambda: HTTPReward("http://a", batch_size=0), ValueError, "`batch_size=0` must be at least 1"),
        (lambda: HTTPReward("http://a", concurrency=0), ValueError, "`concurrency=0` must be at least 1"),
        (lambda: HTTPReward("http://a", retries=-1), ValueError, "`retries=-1` must be at least 0"),
        (lambda: HTTPReward("http://a", timeout=0), ValueError, "`timeout=0` must be more than 0, in seconds"),
        (lambda: HTTPReward("http://a", metadata="gold"), TypeError, r"`metadata='gold'` must be a list .*\['gold'\]"),
        (lambda: HTTPReward("http://a", read=3), TypeError, "`read=3` must be callable, or the dotted name"),
        (
            lambda: HTTPReward("http://a", write="no.where"),
            ValueError,
            "`write='no.where'` must be a callable or the d",
        ),
    ],
)
def test_what_makes_no_endpoint_is_refused(build, error, complaint):
    with pytest.raises(error, match=complaint):
        build()


# --- in a module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_background", [False, True])
def test_a_module_learns_from_a_url(in_background):
    with serving(lengths) as server:
        module = module_of(PPOModule, reward=[server.url], reward_in_background=in_background)
        (experience,) = fit(module, iterations=1).experiences
    assert experience.scores.total.tolist() == [float(len(response)) for response in experience.responses]
    assert list(experience.scores.by_name) == ["127.0.0.1"]


def test_a_checkpoint_knows_its_endpoint():
    options = {"metadata": ["answer"], "read": rewards_of, "timeout": 3.0, "headers": {"X-Kind": "test"}}
    stored = plain_arguments({"reward": [HTTPReward("http://a/b", **options)]})["reward"]
    (reward,) = (reward.function for reward in CombinedReward(stored).rewards)
    assert (reward.endpoint.url, reward.endpoint.timeout, reward.metadata) == ("http://a/b", 3.0, ("answer",))
    assert reward.read is rewards_of
    assert pickle.loads(pickle.dumps(reward)).plain() == reward.plain()


@pytest.mark.invariant(39)
def test_a_run_whose_endpoint_fails_ends_with_the_sample():
    with serving(lambda number, body: (401, "who are you?", {})) as server:
        module = module_of(GRPOModule, reward=HTTPReward(server.url, name="judge"), group_size=2)
        with pytest.raises(RuntimeError, match="`reward` 'judge' raised EndpointError: .* answered 401 .*who are you"):
            fit(module)


def test_a_lost_function_leaves_a_reward_out_of_the_checkpoint():
    assert HTTPReward("http://a", read=lambda answer: answer).plain() is None
    assert CombinedReward("https://judge.org/score").name == "judge.org"
