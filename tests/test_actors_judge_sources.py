"""Every kind of judge, a function, an address and a model of the run's own, and every kind of its failure."""

import json
import pickle
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from judge_parts import batch_of, judge_with, prompt, spec_of, trajectory

from apportion.actors.engines import EngineSpec, Sample
from apportion.actors.judge import JudgeWorker
from apportion.actors.judge_client import (
    Case,
    FunctionJudge,
    ModelJudge,
    ModelJudgeSpec,
    ServiceJudge,
    ServiceJudgeSpec,
)
from apportion.batch import Batch
from apportion.data.builtin import resolve_model
from apportion.data.prompts import load_tokenizer
from apportion.platform.errors import ConfigError

# a function

ORACLE = """
import asyncio, time
def exact(question, steps, answer, **columns):
    return [i for i, step in enumerate(steps) if columns["bad"] in step]
def none(question, steps, answer): return None
def late(question, steps, answer): time.sleep(1)
def wide(question, steps, answer): return [99]
def text(question, steps, answer): return "0"
def fails(question, steps, answer): raise RuntimeError("no idea")
def exits(question, steps, answer): raise SystemExit("no idea")
def interrupts(question, steps, answer): raise KeyboardInterrupt("no idea")
async def awaited(question, steps, answer): return [len(steps) - 1]
def noisy(question, steps, answer, critique): return [critique % 2]
def wild(question, steps, answer, critique): return [99] if critique == 0 else [2]
def picky(question, steps, answer, bad): return [steps.index(bad)]
"""


@pytest.fixture
def oracle(tmp_path):
    file = tmp_path / "oracle.py"
    file.write_text(ORACLE)
    return lambda name, limit=5.0: FunctionJudge(f"{file}:{name}", limit)


def asked(source, steps=("a", "b"), count=1, columns=None, seconds=20.0):
    [critiques] = source.ask([Case("q", list(steps), "2", columns or {})], count, time.monotonic() + seconds)
    return critiques


def test_a_function_names_wrong_steps_from_0_and_sees_the_columns(oracle):
    assert asked(oracle("exact"), columns={"bad": "b"})[0].wrong_steps == [1]
    assert asked(oracle("picky"), columns={"bad": "b", "level": 3})[0].wrong_steps == [1]
    assert asked(oracle("awaited"))[0].wrong_steps == [1]
    assert [c.wrong_steps for c in asked(oracle("noisy"), count=3)] == [[0], [1], [0]]


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("none", "no_opinion"),
        ("wide", "out_of_range"),
        ("text", "unparseable"),
        ("fails", "raised"),
        ("exits", "raised"),
        ("interrupts", "raised"),
        ("late", "slow"),
    ],
)
def test_a_function_that_gives_no_verdict_has_no_vote(oracle, name, failure):
    [critique] = asked(oracle(name, 0.1))
    assert critique.wrong_steps is None and critique.failure == failure
    assert ("no idea" in critique.detail) == (name in ("fails", "exits", "interrupts"))


def test_a_critique_that_names_step_99_of_4_has_no_vote_is_counted_and_leaves_the_others_theirs(oracle):
    judge = judge_with(oracle("wild"), credit={"name": "capo", "voting": "intersection"}, critiques=3)
    report, marks = judge.judge(batch_of("a\n\nb\n\nc\n\nd"), [prompt()], [0])
    assert [c.failure for c in marks.critiques[0]] == ["out_of_range", "", ""]
    assert marks.wrong_steps == [[2]] and set(marks.step_ids[0].tolist()) == {0, 1, 2, 3}
    assert dict(report.failed) == {"out_of_range": 1} and report.unjudged == 0
    means = report.totals().means()
    assert means["judge/failed_share"] == pytest.approx(1 / 3) and means["judge/failed/out_of_range"] == 1.0


def test_a_function_is_not_asked_after_the_batchs_time(oracle):
    assert asked(oracle("awaited"), seconds=-1.0)[0].failure == "slow"


def test_a_functions_critiques_are_not_kept_on_disk_as_its_source_may_change(oracle, tmp_path):
    folder = tmp_path / "kept"
    _, marks = judge_with(oracle("awaited"), folder).judge(batch_of("a\n\nb"), [prompt()], [0])
    assert marks.wrong_steps == [[1]] and not folder.exists()


def test_the_actor_spells_with_the_policys_tokenizer_and_takes_every_second_trajectory(oracle):
    folder = resolve_model("builtin:tiny")
    spec = spec_of(tokenizer=folder, function=oracle("awaited").name.removeprefix("function:"), critiques=1)
    text = "a\n\nb"
    ids = load_tokenizer(folder)(text)["input_ids"]
    rows = [trajectory("", sample=i) for i in range(2)]
    rows = [
        replace(
            row,
            token_ids=np.array([7, *ids, 1], np.int32),
            action_mask=np.ones(len(ids) + 1, bool),
            turn_ids=np.zeros(len(ids) + 1, np.int32),
            behavior_logprobs=np.full(len(ids) + 1, -1.0, np.float32),
        )
        for row in rows
    ]
    report, marks = pickle.loads(pickle.dumps(JudgeWorker(spec).judge(Batch.from_trajectories(rows), [prompt()], 1, 2)))
    assert marks.rows == [1] and marks.wrong_steps == [[1]] and report.responses == 1
    assert marks.step_ids[0].tolist() == [0, 0, 0, 1, 1]


# an address


class FakeJudge:
    """An OpenAI-compatible server on 127.0.0.1: `answer(n, request)` gives (status, text or bytes, finish reason)."""

    def __init__(self, answer):
        self.requests, self.headers = [], []
        self.most = self._now = 0
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.requests.append((self.path, body))
                    fake.headers.append(dict(self.headers))
                    number = len(fake.requests) - 1
                    fake._now += 1
                    fake.most = max(fake.most, fake._now)
                status, text, reason = answer(number, body)
                with lock:
                    fake._now -= 1
                if isinstance(text, str):
                    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
                    text = json.dumps({"choices": [choice]}).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:  # the client has gone
                    pass

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(FakeJudge(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def says(text, status=200, reason="stop"):
    return lambda number, body: (status, text, reason)


def service(*urls, **changes):
    fields = {"model": "judge-7b", "api_key_env": None, "temperature": 0.7, "max_tokens": 64, "context_tokens": 4096}
    fields |= {"timeout_seconds": 5.0, "retries": 0, "concurrency": 8}
    return ServiceJudge(ServiceJudgeSpec(list(urls), **(fields | changes)), len)


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_an_address_is_asked_k_times_in_the_words_of_the_openai_interface(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame-sesame")
    fake = serve(says("Step 2 adds wrongly.\n[2]"))
    critiques = asked(service(fake.url, api_key_env="JUDGE_KEY"), count=3)
    assert [c.wrong_steps for c in critiques] == [[1]] * 3
    assert critiques[0].answer == "Step 2 adds wrongly.\n[2]"
    path, body = fake.requests[0]
    assert path == "/v1/chat/completions" and len(fake.requests) == 3
    assert (body["model"], body["temperature"], body["max_tokens"], body["n"]) == ("judge-7b", 0.7, 64, 1)
    assert "===== step 2 =====\nb" in body["messages"][0]["content"]
    assert fake.headers[0]["Authorization"] == "Bearer sesame-sesame"


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (says("all fine I think"), "unparseable"),
        (says("[99]"), "out_of_range"),
        (says("[1", reason="length"), "cut"),
        (says(b"<html>busy</html>"), "malformed"),
        (says(b'{"choices": []}'), "malformed"),
        (says(b"[" * 100_000), "malformed"),
        (says(b'{"choices": [{"message": {"content": null}}]}'), "malformed"),
        (says("who are you? sesame", status=401), "refused"),
        (says("maximum context length is 8", status=400), "too_long"),
        (says("overloaded", status=503), "down"),
    ],
)
def test_an_answer_that_is_no_verdict_has_no_vote_and_says_why(serve, answer, failure):
    [critique] = asked(service(serve(answer).url))
    assert critique.wrong_steps is None and critique.failure == failure
    assert "sesame" not in critique.detail


def test_a_judge_that_is_down_fails_at_once_and_its_addresss_secrets_are_not_told():
    url = closed_port().replace("http://", "http://me:sesame@") + "?key=sesame"
    start = time.monotonic()
    [critique] = asked(service(url))
    assert critique.failure == "down" and time.monotonic() - start < 3
    assert "ConnectError" in critique.detail and "sesame" not in critique.detail


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("http://127.0.0.1:99999/v1", "whose port is no number from 1 to 65535"),
        ("http://127.0.0.1:abc/v1", "whose port is no number from 1 to 65535"),
        ("http://a..b/v1", "whose host has an empty part between its dots"),
    ],
)
def test_an_address_that_cannot_be_asked_is_a_failed_critique(url, error):
    [critique] = asked(service(url))
    assert critique.failure == "down" and critique.detail == f"no critique; last: got an address {error}"


def test_a_slow_judge_is_given_up_at_its_time_limit_and_at_the_batchs(serve):
    fake = serve(lambda number, body: (time.sleep(1.0), (200, "[]", "stop"))[1])
    start = time.monotonic()
    assert asked(service(fake.url, timeout_seconds=0.2))[0].failure == "slow"
    late = asked(service(fake.url, concurrency=1), count=3, seconds=0.3)
    assert [c.failure for c in late] == ["slow"] * 3
    assert time.monotonic() - start < 1.5


def test_a_request_goes_to_the_next_address_when_one_fails_and_load_is_spread(serve):
    broken, good = serve(says("", status=500)), serve(says("[]"))
    judge = service(broken.url, good.url, retries=1)
    assert [c.wrong_steps for c in asked(judge, count=4)] == [[]] * 4
    assert len(broken.requests) == 2 and len(good.requests) == 4


def test_no_more_critiques_are_under_way_than_allowed(serve):
    fake = serve(lambda number, body: (time.sleep(0.05), (200, "[]", "stop"))[1])
    asked(service(fake.url, concurrency=3), count=12)
    assert fake.most == 3


def test_what_does_not_fit_the_context_is_not_asked(serve):
    fake = serve(says("[]"))
    assert asked(service(fake.url, context_tokens=100))[0].failure == "too_long"
    assert fake.requests == []


def test_half_a_character_in_the_reference_answer_is_a_failed_critique_that_no_judge_is_asked_for(serve):
    fake = serve(says("[]"))
    engine = FakeEngine("[]")
    cases = [Case("q", ["a"], "\ud83d"), Case("q", ["a"], "2")]
    for judge in (service(fake.url), model_judge(engine)):
        critiques = judge.ask(cases, 2, time.monotonic() + 20)
        assert [[c.failure for c in case] for case in critiques] == [["refused"] * 2, [""] * 2]
        assert critiques[0][0].detail.startswith("the judge's prompt cannot be read: got half a character ('\\ud83d')")
    assert len(fake.requests) == 2 and [len(requests) for requests, _ in engine.calls] == [2]


def test_half_of_the_critiques_failing_leaves_the_vote_to_the_others(serve):
    fake = serve(lambda number, body: (200, "[1]" if number % 2 else "?", "stop"))
    report, marks = judge_with(service(fake.url)).judge(batch_of("a\n\nb"), [prompt()], [0])
    assert marks.wrong_steps == [[0]] and report.failed == Counter(unparseable=2)


def test_a_key_that_is_not_set_is_refused_by_the_variables_name(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY, which is not set"):
        service("http://127.0.0.1:1/v1", api_key_env="JUDGE_KEY")


# a model of the run's own


class FakeEngine:
    def __init__(self, text, reason="stop"):
        self.text, self.reason, self.calls = text, reason, []

    def generate(self, requests, sampling):
        self.calls.append((requests, sampling))
        return [Sample(np.zeros(1, np.int32), np.zeros(1, np.float32), self.reason, self.text) for _ in requests]

    def load(self, bundle, name, check):
        raise AssertionError("a judge is frozen")


def model_judge(engine, context=2048, sequences=2, seeded=False):
    folder = resolve_model("builtin:tiny")
    settings = EngineSpec(folder, "bfloat16", 0, context, sequences, 1, 0.5, 1.0, False, True, False, 1, 0, seeded)
    return ModelJudge(ModelJudgeSpec("vllm", settings, 0.7, 64), engine)


def test_a_model_is_asked_k_times_through_its_chat_template():
    engine = FakeEngine("[2]")
    assert [c.wrong_steps for c in asked(model_judge(engine), count=3)] == [[1]] * 3
    [(requests, sampling)] = engine.calls
    assert len(requests) == 3
    assert (sampling.temperature, sampling.max_tokens) == (0.7, 64)
    assert requests[0].token_ids[0] == 3 and requests[0].token_ids[-1] == 4  # <|user|> ... <|assistant|>


def test_in_deterministic_mode_a_critiques_seed_follows_from_what_is_judged_and_its_number():
    def seeds(seeded, steps):
        engine = FakeEngine("[2]")
        case = Case("2 + 2?", steps, None)
        model_judge(engine, seeded=seeded).ask([case], 3, time.monotonic() + 60)
        return [request.seed for requests, _ in engine.calls for request in requests]

    first = seeds(True, ["one", "two"])
    assert seeds(True, ["one", "two"]) == first and len(set(first)) == 3
    assert not set(first) & set(seeds(True, ["one", "three"]))
    assert seeds(False, ["one", "two"]) == [None] * 3


def test_a_models_answer_that_is_cut_too_long_or_late_has_no_vote():
    assert asked(model_judge(FakeEngine("[1]", "length")))[0].failure == "cut"
    engine = FakeEngine("[]")
    assert asked(model_judge(engine, context=200))[0].failure == "too_long"
    assert asked(model_judge(engine), seconds=-1)[0].failure == "slow"
    assert engine.calls == []


def test_an_engine_is_given_portions_so_that_the_batchs_time_can_be_kept():
    engine = FakeEngine("[]")
    asked(model_judge(engine, sequences=2), count=18)
    assert [len(requests) for requests, _ in engine.calls] == [8, 8, 2]
