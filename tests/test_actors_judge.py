"""The judge: steps by token offsets, every kind of judge and of failure, the vote, the caches, and who reads the marks."""

import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.engines import EngineSpec, Sample
from apportion.actors.judge import Judge, JudgeReport, JudgeSpec, JudgeWorker, question_text, steps_of_response
from apportion.actors.judge_cache import CritiqueCache, critique_key
from apportion.actors.judge_client import (
    Case,
    FunctionJudge,
    ModelJudge,
    ModelJudgeSpec,
    ServiceJudge,
    ServiceJudgeSpec,
)
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.algorithms import registry
from apportion.algorithms.interface import judged_method
from apportion.batch import Batch, Critique, Marks, Prompt, Trajectory
from apportion.cli import compose_config, to_config
from apportion.conf.combinations import Machine
from apportion.data import step_sums
from apportion.data.builtin import resolve_model
from apportion.data.prompts import load_tokenizer
from apportion.loop.state import Actors, LoopSettings
from apportion.plan import make_plan
from apportion.platform.cluster import Call
from apportion.platform.errors import ApportionError, ConfigError
from apportion.platform.metric_names import unknown_metrics
from apportion.trainer import Trainer

END = 0  # spelled as nothing, like a special token


def decode(ids):
    return "".join(chr(token) for token in ids if token != END)


def encode(text):
    return [ord(character) for character in text]


def trajectory(text, prompt="p", sample=0, group=0, turn_ids=None):
    response = [*encode(text), END]
    turns = np.zeros(len(response), np.int32) if turn_ids is None else np.asarray(turn_ids, np.int32)
    mask = turns >= 0
    return Trajectory(
        prompt,
        group,
        sample,
        np.array([7, *response], np.int32),
        1,
        mask,
        turns,
        np.where(mask, -1.0, np.nan).astype(np.float32),
        0,
        "stop",
        text,
    )


def batch_of(*texts, **kwargs):
    return Batch.from_trajectories([trajectory(text, sample=i, **kwargs) for i, text in enumerate(texts)])


def prompt(columns=None, name="p", text="1 + 1?"):
    return Prompt(name, np.array([7], np.int32), text, columns or {})


CAPO = {"name": "capo"}


def spec_of(folder=None, **changes):
    fields = {
        "credit": CAPO,
        "tokenizer": "",
        "trust_remote_code": False,
        "delimiter": "\n\n",
        "answer_column": "answer",
        "critiques": None,
        "timeout_seconds": 5.0,
        "batch_timeout_seconds": 20.0,
        "cache_folder": None if folder is None else str(folder),
    }
    return JudgeSpec(**(fields | changes))


class Scripted:
    """Says the given critiques of whatever it is asked, and remembers what that was."""

    durable = True
    name = "scripted"

    def __init__(self, *critiques):
        self.critiques, self.asked = list(critiques), []

    def content(self, case):
        return case.prompt()

    def ask(self, cases, count, deadline):
        self.asked += cases
        return [[self.critiques[k % len(self.critiques)] for k in range(count)] for _ in cases]

    def close(self):
        return None


def judge_with(source, folder=None, **changes):
    return Judge(spec_of(folder, **changes), source, decode)


# steps


def test_every_token_has_its_step_and_the_end_token_is_of_the_last():
    steps, ids = steps_of_response([*encode("a\n\nbc"), END], np.zeros(6), decode, "\n\n")
    assert steps == ["a\n\n", "bc"]
    assert ids == [0, 0, 0, 1, 1, 1]


def test_what_an_environment_wrote_is_a_step_of_its_own_and_each_turns_end_stays_with_its_turn():
    tokens = [*encode("go"), END, *encode("seen"), *encode("up"), END]
    turns = np.array([0, 0, 0, -1, -1, -1, -1, 1, 1, 1])
    steps, ids = steps_of_response(tokens, turns, decode, "\n\n")
    assert steps == ["go", "seen", "up"]
    assert ids == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_a_response_of_special_tokens_or_white_space_has_no_step_but_its_tokens_have_a_number():
    assert steps_of_response([END], np.zeros(1), decode, "\n\n") == ([], [0])
    assert steps_of_response(encode(" \n"), np.zeros(2), decode, "\n\n") == ([], [0, 0])
    assert steps_of_response([], np.zeros(0), decode, "\n\n") == ([], [])


def test_the_question_of_several_messages_names_their_roles():
    assert question_text("q") == "q"
    assert question_text([{"role": "user", "content": "q"}]) == "q"
    assert (
        question_text([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]) == "system: s\n\nuser: q"
    )


# the vote and the marks


@pytest.mark.parametrize(
    ("voting", "wrong"), [("intersection", []), ("majority", [1]), ("union", [0, 1])]
)  # of [1], [0, 1], [] and one that failed
def test_the_credit_methods_own_vote_decides(voting, wrong):
    source = Scripted(Critique([1]), Critique([0, 1]), Critique([]), Critique(None, "unparseable", "?"))
    report, marks = judge_with(source, credit={"name": "capo", "voting": voting}).judge(
        batch_of("a\n\nb"), [prompt()], [0]
    )
    assert marks.wrong_steps == [wrong]
    assert report.failed == Counter(unparseable=1) and report.critiques == 4 and report.unjudged == 0


def test_no_critique_left_means_no_penalty_and_is_counted():
    report, marks = judge_with(Scripted(Critique(None, "down", detail="gone"))).judge(
        batch_of("a\n\nb", "c"), [prompt()], [0, 1]
    )
    assert marks.wrong_steps == [[], []]
    assert report.unjudged == 2 and report.failed == Counter(down=8)
    assert report.first_failure == "a critique is down, has no vote and is counted: gone"


def test_two_judges_share_a_batch_by_rows_and_the_marks_meet_on_it():
    batch = batch_of("a\n\nb", "c", "d\n\ne\n\nf")
    judge = judge_with(Scripted(Critique([0])), critiques=1)
    parts = [judge.judge(batch, [prompt()], range(part, 3, 2))[1] for part in (1, 0)]
    marked = Marks.apply(batch, parts)
    assert marked.wrong_steps == [[0], [0], [0]]
    assert marked.step_ids.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert [len(c) for c in marked.critiques] == [1, 1, 1]
    assert Batch.concat([marked, marked]).select([5]).wrong_steps == [[0]]


def test_marks_that_leave_out_a_row_are_refused():
    batch = batch_of("a", "b")
    _, marks = judge_with(Scripted(Critique([])), critiques=1).judge(batch, [prompt()], [1])
    with pytest.raises(ValueError, match="got 1 rows of 2 trajectories"):
        Marks.apply(batch, [marks])
    assert Marks.apply(batch, []) is batch


def test_a_response_without_steps_is_not_asked_about():
    source = Scripted(Critique([0]))
    report, marks = judge_with(source).judge(batch_of(""), [prompt()], [0])
    assert source.asked == [] and marks.wrong_steps == [[]] and marks.critiques == [[]]
    assert (report.without_steps, report.critiques, report.unjudged) == (1, 0, 0)


def test_the_judge_sees_the_reference_answer_only_from_its_column():
    source = Scripted(Critique([]))
    judge_with(source).judge(batch_of("a"), [prompt({"answer": 2, "level": 3})], [0])
    judge_with(source, answer_column=None).judge(batch_of("a"), [prompt({"answer": 2})], [0])
    assert [(case.answer, case.columns) for case in source.asked] == [("2", {"level": 3}), (None, {"answer": 2})]


def test_what_a_report_logs_has_a_line_in_the_table_of_metrics():
    report = JudgeReport(4, 1, 9, 2, 12, 4, Counter(down=3), 1, 0.5)
    means = report.totals().means()
    assert unknown_metrics(means) == []
    assert means["judge/failed_share"] == 0.25 and means["judge/unjudged_share"] == pytest.approx(1 / 3)
    assert means["judge/failed/down"] == 3 and means["judge/steps_mean"] == 2.25


# caches


def test_equal_responses_are_asked_once_and_later_batches_not_at_all():
    source = Scripted(Critique([0]))
    judge = judge_with(source, critiques=2)
    first, _ = judge.judge(batch_of("a", "a", "b"), [prompt()], [0, 1, 2])
    second, marks = judge.judge(batch_of("b", "a"), [prompt()], [0, 1])
    assert len(source.asked) == 2
    assert (first.critiques, first.cached) == (6, 2) and (second.critiques, second.cached) == (4, 4)
    assert marks.wrong_steps == [[0], [0]]


def test_critiques_are_kept_on_disk_as_json_and_found_by_content(tmp_path):
    source = Scripted(Critique([0], "", "Step 1 is wrong.\n[1]"))
    judge_with(source, tmp_path).judge(batch_of("a"), [prompt()], [0])
    again = Scripted(Critique([]))
    report, marks = judge_with(again, tmp_path).judge(batch_of("a"), [prompt()], [0])
    assert again.asked == [] and report.cached == 4 and marks.wrong_steps == [[0]]
    (file,) = tmp_path.rglob("*.json")
    kept = {"wrong_steps": [0], "failure": "", "answer": "Step 1 is wrong.\n[1]", "detail": ""}
    assert json.loads(file.read_text()) == [kept] * 4
    judge_with(again, tmp_path).judge(batch_of("a"), [prompt(text="2 + 2?")], [0])
    judge_with(again, tmp_path, critiques=2).judge(batch_of("a"), [prompt()], [0])
    assert len(again.asked) == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", '[{"wrong_steps": ["a"], "failure": "", "answer": "", "detail": ""}]', "7"]
)
def test_a_file_that_holds_no_critiques_is_asked_again_and_told(tmp_path, text):
    key = critique_key("j", "c", 1)
    (tmp_path / key[:2]).mkdir()
    (tmp_path / key[:2] / f"{key}.json").write_text(text)
    cache = CritiqueCache(tmp_path)
    assert cache.get(key, 1) is None
    assert "asked again" in cache.problem


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    judge = judge_with(Scripted(Critique([0])), tmp_path / "file")
    report, marks = judge.judge(batch_of("a"), [prompt()], [0])
    assert marks.wrong_steps == [[0]] and "cannot be read, so it is asked again" in report.cache_problem


def test_a_judge_that_was_down_is_asked_again_while_an_unreadable_answer_is_kept(tmp_path):
    source = Scripted(Critique(None, "down"))
    judge = judge_with(source, tmp_path)
    judge.judge(batch_of("a"), [prompt()], [0])
    source.critiques = [Critique(None, "unparseable", "well")]
    for _ in range(2):
        judge.judge(batch_of("a"), [prompt()], [0])
    assert len(source.asked) == 2


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
    [("none", "no_opinion"), ("wide", "out_of_range"), ("text", "unparseable"), ("fails", "raised"), ("late", "slow")],
)
def test_a_function_that_gives_no_verdict_has_no_vote(oracle, name, failure):
    [critique] = asked(oracle(name, 0.1))
    assert critique.wrong_steps is None and critique.failure == failure
    assert ("no idea" in critique.detail) == (name == "fails")


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


def model_judge(engine, context=2048, sequences=2):
    folder = resolve_model("builtin:tiny")
    settings = EngineSpec(folder, "bfloat16", 0, context, sequences, 1, 0.5, 1.0, False, True, False, 1, 0)
    return ModelJudge(ModelJudgeSpec("vllm", settings, 0.7, 64), engine)


def test_a_model_is_asked_k_times_through_its_chat_template():
    engine = FakeEngine("[2]")
    assert [c.wrong_steps for c in asked(model_judge(engine), count=3)] == [[1]] * 3
    [(requests, sampling)] = engine.calls
    assert len(requests) == 3
    assert (sampling.temperature, sampling.max_tokens) == (0.7, 64)
    assert requests[0].token_ids[0] == 3 and requests[0].token_ids[-1] == 4  # <|user|> ... <|assistant|>


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


# who reads the marks


def credit_worker(selection=()):
    spec = CreditSpec(CAPO, {"name": "token_mean"}, [], list(selection), False, "k3", "", False)
    worker = CreditWorker(spec)
    worker._tokenizer = SimpleNamespace(decode=lambda ids: decode(np.asarray(ids).tolist()))
    return worker


def judged(wrong, rewards, groups):
    parts = [trajectory("a\n\nb", prompt=f"p{g}", sample=i, group=g) for i, g in enumerate(groups)]
    batch = Batch.from_trajectories(parts)
    batch = replace(batch, rewards=np.array(rewards, float), sample_mask=np.ones(len(rewards), bool))
    critiques = [[Critique(steps, "", f"{steps}")] for steps in wrong]
    ids = [np.array([0, 0, 0, 1, 1], np.int32)] * len(wrong)
    return batch, Marks(list(range(len(wrong))), ids, wrong, critiques)


@pytest.mark.parametrize("by", ["auto", "tokens"])
def test_selection_keeps_a_group_that_is_all_right_where_a_step_is_wrong(by):
    batch, marks = judged([[], [0], [], [], [], []], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2])
    report, kept = credit_worker([{"name": "dynamic_sampling", "by": by}]).admit(batch, marks)
    assert kept.group_ids.tolist() == [0, 0] and (report.groups_kept, report.groups_dropped) == (1, 2)
    assert kept.wrong_steps == [[], [0]]


def test_tokens_of_a_wrong_step_earn_less_and_samples_say_why():
    batch, marks = judged([[], [0]], [1, 1], [0, 0])
    worker = credit_worker()
    _, admitted = worker.admit(batch, marks)
    _, shard = worker.cut(1, 1, 1, admitted)
    report, credited = worker.credit(1, 0.0, 2, shard)
    first, second = credited.advantages[:5], credited.advantages[5:]
    # 7 tokens earn 2 and 3 earn 1: mean 1.7, sample deviation 0.48305
    assert first == pytest.approx([0.6211] * 5, abs=1e-3)
    assert second == pytest.approx([-1.4491] * 3 + [0.6211] * 2, abs=1e-3)
    sample = report.samples[1]
    assert sample["steps"] == ["a\n\n", "b"] and sample["step_ids"] == [0, 0, 0, 1, 1] and sample["wrong_steps"] == [0]
    assert sample["critiques"] == [{"wrong_steps": [0], "failure": "", "answer": "[0]", "detail": ""}]
    assert credited.critiques is None and credited.wrong_steps == [[], [0]]


def test_the_vote_is_found_inside_a_method_that_wraps_it():
    wrapped = registry.build("credit", {"name": "hidden_reward", "base": {"name": "capo", "voting": "union"}})
    assert "critiques" in wrapped.needs and judged_method(wrapped).vote([[0], []]) == [0]
    with pytest.raises(ValueError, match="expected the three of JudgedMethod"):
        judged_method(registry.build("credit", {"name": "grpo"}))


# the loop, with actors that answer in place


class InPlace:
    """An actor whose methods run when they are called; what Ray would send is pickled on its way."""

    def __init__(self, name, target):
        self.name, self.target, self.called = name, target, []

    def call(self, method, *arguments, returns=1):
        self.called.append(method)
        answer = getattr(self.target, method)(*pickle.loads(pickle.dumps(arguments)))
        return Call(self, method, list(answer) if returns != 1 else [answer])


class Sampler:
    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts, first_group, responses, sampling):
        rows = [
            trajectory(text, prompt=p.prompt_id, sample=i, group=first_group + g)
            for g, p in enumerate(prompts)
            for i, text in enumerate(self.texts[:responses])
        ]
        return RolloutReport(0.1, 10, len(rows)), Batch.from_trajectories(rows)


class AllRight:
    def score(self, batch, prompts):
        ones = np.ones(len(batch))
        return ScoreReport(samples=len(batch), scored=len(batch)), replace(batch, rewards=ones, sample_mask=ones > 0)


class JudgeActor:
    def __init__(self, source):
        self._judge = judge_with(source, critiques=1)

    def judge(self, batch, prompts, part, parts):
        return self._judge.judge(batch, prompts, range(part, len(batch), parts))


def loop(monkeypatch, source, limit=1.0):
    """A trainer of two engines and two judges whose answers are all right, with dynamic sampling."""
    monkeypatch.setattr("apportion.trainer.gather", lambda calls, seconds, what: [call.refs[0] for call in calls])
    names = iter(range(100))
    actors = Actors(
        rollout=[InPlace(f"rollout-{i}", Sampler(["a\n\nb", "c"])) for i in range(2)],
        reward=[InPlace("reward-0", AllRight())],
        credit=InPlace("credit-0", credit_worker([{"name": "dynamic_sampling", "by": "auto"}])),
        policy=[],
        judge=[InPlace(f"judge-{i}", JudgeActor(source)) for i in range(2)],
    )
    settings = LoopSettings(
        1, 2, 2, None, 1, False, True, 0.1, True, 60.0, 0, 2, None, 0, False, {"run": 0}, max_failed_critiques=limit
    )
    prompts = SimpleNamespace(next_batch=lambda count: [prompt(name=f"p{next(names)}") for _ in range(count)])
    warned = []
    tracker = SimpleNamespace(warn=warned.append)
    return Trainer(actors, prompts, settings, None, tracker, None), warned


def test_the_loop_hands_each_engines_batch_to_all_judges_and_their_marks_to_selection(monkeypatch):
    trainer, warned = loop(monkeypatch, Scripted(Critique([0])))
    experience = trainer._collect()
    # Every step 0 is wrong, so each group, though all right, has tokens that earn differently: one round is enough.
    assert [judge.called for judge in trainer.actors.judge] == [["judge"] * 2] * 2
    assert experience.groups == 2 and [b.wrong_steps for b in experience.admitted] == [[[0], [0]]] * 2
    means = trainer.failures.totals.means()
    assert means["judge/failed_share"] == 0.0 and means["judge/wrong_step_share"] == pytest.approx(4 / 6)
    assert trainer.failures.totals.sums["judge/critiques"] == 4 and warned == [] and "judge" in trainer._timing


def test_the_loop_goes_on_without_a_judge_that_is_down_and_stops_where_the_run_asked_for_that(monkeypatch):
    down = Scripted(Critique(None, "down", detail="http://h/v1: ConnectError"))
    trainer, warned = loop(monkeypatch, down)
    with pytest.raises(ApportionError, match="no group of this step is left"):  # all right and unjudged: all alike
        trainer._collect()
    assert warned == ["judge: a critique is down, has no vote and is counted: http://h/v1: ConnectError"]
    assert trainer.failures.totals.means()["judge/unjudged_share"] == 1.0
    trainer, _ = loop(monkeypatch, down, limit=0.5)
    with pytest.raises(ApportionError, match="judge: 100% of this step's critiques failed") as stopped:
        trainer._collect()
    assert str(stopped.value) == (
        "judge: 100% of this step's critiques failed, expected at most 50% (judge.max_failed_share); "
        "the first: a critique is down, has no vote and is counted: http://h/v1: ConnectError"
    )


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


# the configuration

MACHINE = Machine(2, 64 * 2**30, 0)


def plan_of(*overrides):
    return make_plan(to_config(compose_config(["experiment=tiny_grpo", "algorithm=capo", *overrides]))[0], MACHINE)


FUNCTION = "judge.function=apportion.data.step_sums:judge"


def test_a_method_that_needs_critiques_gets_a_judge_and_others_get_none():
    assert "critiques" in plan_of(FUNCTION).needs
    assert plan_of(FUNCTION, "judge.workers=2").actor("judge").count == 2
    assert plan_of("judge.model=builtin:tiny", "judge.context_tokens=2048").actor("judge").cpus == 1
    assert plan_of(FUNCTION, "algorithm=grpo").actor("judge") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "judge: got none with algorithm capo, which needs critiques, expected judge.function="),
        (["judge.function=apportion.data.step_sums:juge"], "judge.function: apportion.data.step_sums:juge"),
        (["judge.function=math:sqrt"], "expected f(question, steps, answer, **columns)"),
        ([FUNCTION, "judge.model=x"], "judge: got judge.function and judge.model, expected one of"),
        (["judge.url=http://127.0.0.1:1/v1"], "judge.model: got null with judge.url"),
        (["judge.url=localhost:1", "judge.model=m"], "judge.url: got an address that is not one"),
        (["judge.url=[]", "judge.model=m"], "judge.url: got an empty list"),
        (
            ["judge.url=http://h/v1", "judge.model=m", "judge.api_key_env=NO_SUCH_KEY"],
            "got NO_SUCH_KEY, which is not set",
        ),
        ([FUNCTION, "judge.api_key_env=X"], "judge.api_key_env: got a name without judge.url"),
        (["judge.url=http://h/v1", "judge.model=m", "judge.temperature=0"], "which would all be the same"),
        ([FUNCTION, "judge.batch_timeout_seconds=1800"], "expected less than cluster.call_timeout_seconds=1800"),
        (["judge.model=builtin:tiny"], "judge.context_tokens: got 8192, expected at most 2048"),
        ([FUNCTION, "judge.context_tokens=64"], "expected more than judge.max_tokens=1024"),
        ([FUNCTION, "judge.delimiter=''"], "judge.delimiter: got an empty text"),
        ([FUNCTION, "judge.workers=0"], "judge.workers: got 0, expected at least 1"),
        (
            ["judge.model=builtin:tiny", "judge.context_tokens=2048", "judge.tensor_parallel_size=2"],
            "judge.tensor_parallel_size: got 2 with judge.engine=vllm and cluster.gpus_per_judge=0",
        ),
    ],
)
def test_a_judge_that_cannot_work_is_refused_in_one_line_before_anything_starts(overrides, message):
    with pytest.raises(ConfigError) as refused:
        plan_of(*overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


# the task of the recipe


def test_sums_of_the_recipe_are_on_one_side_only_and_the_same_every_time():
    sides = {side: list(step_sums.rows(side, count=300)) for side in ("train", "eval")}
    held_out = {tuple(sorted(row["terms"])) for row in sides["eval"]}
    assert held_out.isdisjoint(tuple(sorted(row["terms"])) for row in sides["train"])
    assert all(int(row["answer"]) == sum(row["terms"]) for row in sides["train"])
    assert list(step_sums.rows("eval", count=300)) == sides["eval"]


def test_the_exact_judge_finds_each_wrong_sum_whatever_the_final_number():
    steps = ["2 + 2 = 5\n", "so far so good\n", "5 + 3 = 7 and 1+1 = 2\n", "1 + 2 + 3 = 6"]
    assert step_sums.judge("2 + 2 + 3:", steps, "7") == [0, 2]


# the whole run


@pytest.mark.system
def test_a_run_with_a_judge_model_of_its_own_keeps_its_critiques_beside_the_trajectories(tmp_path):
    words = ["experiment=tiny_grpo", "algorithm=capo", "judge.model=builtin:tiny", "judge.context_tokens=2048"]
    words += [
        "judge.max_tokens=8",
        "judge.critiques=2",
        "judge.concurrency=8",
        "judge.max_failed_share=1",
        "train.steps=1",
        "train.prompts_per_step=2",
    ]
    words += ["data.eval=null", "tracking.plots=false", "checkpoint.final=false"]
    words += [f"runs_folder={tmp_path}", "run_name=judged"]
    done = subprocess.run(
        [sys.executable, "-m", "apportion", "train", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [step] = [json.loads(line) for line in (tmp_path / "judged" / "metrics.jsonl").read_text().splitlines()]
    # A random model gives no verdict: every critique is counted, has no vote, and nothing is penalised.
    assert step["judge/critiques"] == 16 and step["judge/failed_share"] == 1.0 and step["judge/unjudged_share"] == 1.0
    assert step["credit/wrong_token_share"] == 0.0 and step["timing/judge"] > 0
    samples = [json.loads(line) for line in (tmp_path / "judged" / "samples.jsonl").read_text().splitlines()]
    assert all(len(sample["critiques"]) == 2 and sample["wrong_steps"] == [] for sample in samples)
    assert {c["failure"] for sample in samples for c in sample["critiques"]} <= {"cut", "unparseable"}
    assert len(list((tmp_path / "judged" / "critiques").rglob("*.json"))) <= 8
