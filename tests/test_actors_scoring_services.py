"""Rewards from services: requests, addresses that fail or never answer, answers that are none, and secrets."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scoring_parts import NAN, batch_of, score


class Service:
    """A server on this machine that answers with `reply(body) -> (status, bytes)` and keeps what it was asked.

    In place of bytes, pieces: they are sent as they come, as the first of 1000 bytes.
    """

    def __init__(self, reply):
        service = self
        self.asked: list[dict] = []
        self.headers: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append(body)
                service.headers.append(dict(self.headers))
                status, content = reply(body)
                self.send_response(status)
                whole = isinstance(content, bytes)
                self.send_header("Content-Length", str(len(content) if whole else 1000))
                self.end_headers()
                for piece in [content] if whole else content:
                    self.wfile.write(piece)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.server.handle_error = lambda *arguments: None  # a client that has given up is part of the tests
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve():
    services = []

    def start(reply) -> Service:
        services.append(Service(reply))
        return services[-1]

    yield start
    for service in services:
        service.server.shutdown()
        service.server.server_close()


def lengths_reply(body):
    return 200, json.dumps({"rewards": [len(c) for c in body["completions"]]}).encode()


def test_a_service_is_sent_prompts_completions_and_columns(serve):
    service = serve(lengths_reply)
    batch, report = score(service.url, *batch_of("ab", "c"))
    assert batch.rewards.tolist() == [2.0, 1.0]
    assert service.asked == [{"prompts": ["q0", "q1"], "completions": ["ab", "c"], "columns": {"answer": ["0", "1"]}}]
    assert report.component_means == {"127.0.0.1": 1.5}


def test_requests_are_spread_over_the_addresses(serve):
    services = [serve(lengths_reply), serve(lengths_reply)]
    entry = {"urls": [s.url for s in services], "batch_size": 1, "name": "judge"}
    batch, _ = score(entry, *batch_of("a", "bb", "ccc", "dddd"))
    assert batch.rewards.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert [len(s.asked) for s in services] == [2, 2]


def test_a_busy_address_is_retried_elsewhere(serve):
    busy, free = serve(lambda body: (503, b"")), serve(lengths_reply)
    batch, report = score({"urls": [busy.url, free.url], "batch_size": 2}, *batch_of("a", "bb"))
    assert batch.rewards.tolist() == [1.0, 2.0]
    assert (len(busy.asked), len(free.asked), report.failed) == (1, 1, {})


def test_an_address_where_nobody_listens_is_retried_and_then_a_failure(serve):
    dead = serve(lengths_reply)
    dead.server.shutdown()
    dead.server.server_close()
    _, report = score({"urls": [dead.url], "retries": 1}, *batch_of("a", "bb"))
    assert report.failed == {"service": 2}
    assert report.first_traceback == f"127.0.0.1: 2 attempts failed; last: {dead.url}: ConnectError"


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((200, b'{"rewards": [1.0]}'), "got 1 rewards for 2 completions"),
        ((200, b"oops"), "the answer is no JSON, expected JSON of the form {'rewards': [...]}"),
        ((200, b'{"scores": []}'), "the answer has no rewards, expected JSON of the form {'rewards': [...]}"),
        ((201, b'{"rewards": [1.0, 1.0]}'), "status 201, expected 200"),
        ((422, b"{}"), "status 422, expected 200"),
    ],
)
def test_an_answer_that_is_not_one_is_a_failure_and_not_asked_for_again(serve, reply, problem):
    service = serve(lambda body: reply)
    batch, report = score(service.url, *batch_of("a", "b"))
    assert np.isnan(batch.rewards).all()
    assert report.failed == {"service": 2}
    assert report.first_traceback == f"127.0.0.1: {service.url}: {problem}"
    assert len(service.asked) == 1


def test_elements_of_a_service_are_checked_like_any_other(serve):
    service = serve(lambda body: (200, b'{"rewards": [[0.5, 0.5], null, "x", NaN]}'))
    batch, report = score(service.url, *batch_of("ab", "ab", "ab", "ab"))
    np.testing.assert_array_equal(batch.rewards, [1.0, NAN, NAN, NAN])
    assert (report.failed, report.no_opinion) == ({"wrong_type": 1, "not_finite": 1}, 1)


@pytest.mark.parametrize("said", ["1e300", "-1e19", "[1e200, 0.0]", "1" + "0" * 400, "[1e308, 1e308]"])
def test_a_reward_that_credit_could_not_square_is_a_failure_unless_it_is_clipped(serve, said):
    service = serve(lambda body: (200, b'{"rewards": [%s, 1e18]}' % said.encode()))
    batch, report = score(service.url, *batch_of("ab", "ab"))
    np.testing.assert_array_equal(batch.rewards, [NAN, 1e18])
    assert report.failed == {"not_finite": 1} and "\n" not in report.first_traceback
    if "000" not in said:
        clipped, report = score(service.url, *batch_of("ab", "ab"), clip=2.0)
        assert report.failed == {} and np.abs(clipped.rewards).max() <= 4.0


def test_components_that_add_up_to_too_much_are_a_failure(serve):
    service = serve(lambda body: (200, b'{"rewards": [1e308]}'))
    entries = [{"function": service.url, "weight": 1e6}, {"function": service.url, "name": "other"}]
    batch, report = score(entries, *batch_of("ab"))
    assert np.isnan(batch.rewards).all() and report.failed == {"not_finite": 1}
    assert report.first_traceback == "reward: the weighted sum of its components is inf in size, expected at most 1e+18"


def test_a_service_that_is_too_slow_fails_its_samples_in_time(serve):
    def slow(body):
        time.sleep(1.0)
        return lengths_reply(body)

    start = time.monotonic()
    _, report = score({"function": serve(slow).url, "timeout_seconds": 0.3}, *batch_of("a"))
    assert time.monotonic() - start < 0.9
    assert report.failed == {"timeout": 1}


def no_answer(body):
    time.sleep(10.0)
    return 200, b""


def answer_in_drops(body):
    def drops():
        while True:
            time.sleep(0.05)
            yield b" "

    return 200, drops()


@pytest.mark.slow
@pytest.mark.parametrize("reply", [no_answer, answer_in_drops])
def test_an_address_that_never_answers_leaves_time_for_another(serve, reply):
    hanging, good = serve(reply), serve(lengths_reply)
    entry = {"urls": [hanging.url, good.url], "batch_size": 1, "retries": 3, "timeout_seconds": 4}
    batch, report = score(entry, *batch_of("a", "bb", "ccc", "dddd"))
    assert batch.rewards.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert report.failed == {}
    assert (len(hanging.asked), len(good.asked)) == (2, 4)


@pytest.mark.slow
def test_every_attempt_is_made_within_the_limit_and_the_last_may_be_the_one(serve):
    hanging, good = [serve(no_answer) for _ in range(3)], serve(lengths_reply)
    entry = {"urls": [*(s.url for s in hanging), good.url], "batch_size": 2, "retries": 3, "timeout_seconds": 3}
    start = time.monotonic()
    batch, _ = score(entry, *batch_of("a", "bb"))
    assert time.monotonic() - start < 3.0
    assert batch.rewards.tolist() == [1.0, 2.0]
    assert [len(s.asked) for s in (*hanging, good)] == [1, 1, 1, 1]


@pytest.mark.slow
def test_one_address_alone_has_the_whole_time_for_one_answer(serve):
    def slow(body):
        time.sleep(1.0)
        return lengths_reply(body)

    service = serve(slow)
    batch, _ = score({"function": service.url, "retries": 3, "timeout_seconds": 3}, *batch_of("ab"))
    assert batch.rewards.tolist() == [2.0]
    assert len(service.asked) == 1


def test_numbers_that_json_has_no_form_for_are_sent_as_null_and_cost_no_sample(serve):
    service = serve(lengths_reply)
    batch, prompts = batch_of("a", "bb", "ccc")
    odd = [{"low": -math.inf, "at": [1, math.nan]}, np.array([[np.inf, 2.5]], np.float32), "nan"]
    for prompt, level, other in zip(prompts, (math.nan, np.float32(0.5), 3), odd, strict=True):
        prompt.columns |= {"level": level, "other": other}
    scored, report = score(service.url, batch, prompts)
    assert scored.rewards.tolist() == [1.0, 2.0, 3.0]
    assert report.failed == {}
    assert service.asked[0]["columns"] == {
        "answer": ["0", "1", "2"],
        "level": [None, 0.5, 3],
        "other": [{"low": None, "at": [1, None]}, [[None, 2.5]], "nan"],
    }


def test_a_text_of_urls_is_a_list_of_one(serve):
    service = serve(lengths_reply)
    batch, _ = score({"urls": service.url}, *batch_of("ab"))
    assert batch.rewards.tolist() == [2.0]


def test_secrets_are_sent_and_never_shown(serve, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("APPORTION_TEST_TOKEN", "Bearer top-secret")
    service = serve(lambda body: (403, b"Bearer top-secret is wrong"))
    url = service.url.replace("http://", "http://user:pa55@") + "?key=hidden"
    _, report = score({"function": url, "auth_env": "APPORTION_TEST_TOKEN"}, *batch_of("a"))
    assert service.headers[0]["Authorization"] == "Bearer top-secret"
    assert report.first_traceback == f"127.0.0.1: {service.url}: status 403, expected 200"
    for secret in ("top-secret", "pa55", "hidden"):
        assert secret not in caplog.text
