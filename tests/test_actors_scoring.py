"""Rewards: what is accepted, what fails and how that is counted, time limits, services and reward models."""

import asyncio
import json
import math
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from apportion.actors.scoring import Scorer, ScoreReport
from apportion.batch import Batch, Prompt, Trajectory
from apportion.platform.errors import ConfigError, RewardError

NAN = math.nan


def trajectory(prompt_id: str, text: str, turn_ids: list[int] | None = None) -> Trajectory:
    """One token a character unless `turn_ids` says otherwise; -1 marks an environment's token."""
    turns = np.array([0] * len(text) if turn_ids is None else turn_ids, np.int32)
    actions = turns >= 0
    return Trajectory(
        prompt_id,
        group_id=0,
        sample_index=0,
        token_ids=np.array([7, 8, *range(20, 20 + len(turns))], np.int32),
        prompt_length=2,
        action_mask=actions,
        turn_ids=turns,
        behavior_logprobs=np.where(actions, -1.0, np.nan).astype(np.float32),
        policy_version=0,
        finish_reason="stop",
        text=text,
    )


def batch_of(*texts: str) -> tuple[Batch, list[Prompt]]:
    prompts = [
        Prompt(f"rows:{i}:0", np.array([7, 8], np.int32), f"q{i}", {"answer": str(i)}, "rows")
        for i in range(len(texts))
    ]
    return Batch.from_trajectories([trajectory(f"rows:{i}:0", text) for i, text in enumerate(texts)]), prompts


def score(entries, batch, prompts, **options) -> tuple[Batch, ScoreReport]:
    scorer = Scorer(entries, **options)
    try:
        return scorer.score(batch, prompts)
    finally:
        scorer.close()


def lengths(completions, **columns):
    return [float(len(c)) for c in completions]


def test_a_plain_reward_reaches_the_batch_with_a_mask_of_what_is_usable():
    batch, report = score(lengths, *batch_of("ab", "c"))
    assert batch.rewards.tolist() == [2.0, 1.0]
    assert batch.sample_mask.tolist() == [True, True]
    assert batch.token_rewards is None
    assert (report.samples, report.scored, sum(report.failed.values()), report.no_opinion) == (2, 2, 0, 0)
    assert report.component_means == {"lengths": 1.5}
    assert report.first_traceback is None


def test_functions_are_given_what_trl_gives_them():
    seen = {}

    def keep(prompts, completions, answer, completion_ids, **rest):
        seen.update(prompts=prompts, completions=completions, answer=answer, completion_ids=completion_ids, rest=rest)
        return [0.0] * len(prompts)

    batch, prompts = batch_of("ab", "c")
    prompts[1].columns["level"] = 3
    score(keep, batch, prompts)
    assert seen["prompts"] == ["q0", "q1"]
    assert seen["completions"] == ["ab", "c"]
    assert seen["answer"] == ["0", "1"]
    assert seen["completion_ids"] == [[20, 21], [20]]
    assert seen["rest"] == {"prompt_ids": [[7, 8], [7, 8]], "level": [None, 3]}


def test_prompts_as_messages_give_completions_as_messages():
    seen = []

    def keep(prompts, completions):
        seen.extend([*prompts, *completions])
        return [1.0]

    batch, [prompt] = batch_of("hi")
    messages = [{"role": "user", "content": "q"}]
    score(keep, batch, [replace(prompt, prompt=messages)])
    assert seen == [messages, [{"role": "assistant", "content": "hi"}]]


def test_trajectories_of_one_prompt_share_it_and_a_lost_prompt_is_an_error():
    _, prompts = batch_of("a", "b")
    group = Batch.from_trajectories([trajectory("rows:1:0", t) for t in ("x", "yy")])
    batch, _ = score(lambda completions, answer: [float(a) for a in answer], group, prompts)
    assert batch.rewards.tolist() == [1.0, 1.0]
    with pytest.raises(RewardError, match="prompts: got none for 'rows:1:0' and 1 more"):
        score(lengths, group, prompts[:1])


def test_components_are_weighted_and_their_means_are_reported_before_weights():
    def ones(completions):
        return [1] * len(completions)

    entries = [{"function": lengths, "weight": 0.5}, {"function": ones, "weight": -2.0, "name": "penalty"}, ones]
    batch, report = score(entries, *batch_of("abcd", "ab"))
    assert batch.rewards.tolist() == [1.0, 0.0]
    assert report.component_means == {"lengths": 3.0, "penalty": 1.0, "ones": 1.0}


def test_two_components_of_one_name_stay_apart():
    _, report = score([lengths, {"function": lengths, "weight": 2.0}], *batch_of("ab"))
    assert report.component_means == {"lengths": 2.0, "lengths_2": 2.0}


def test_none_is_no_opinion_and_only_masks_where_nobody_has_one():
    def odd(completions):
        return [1.0 if len(c) % 2 else None for c in completions]

    def long(completions):
        return [10.0 if len(c) > 2 else None for c in completions]

    batch, report = score([odd, long], *batch_of("a", "abc", "ab"))
    np.testing.assert_array_equal(batch.rewards, [1.0, 11.0, NAN])
    assert batch.sample_mask.tolist() == [True, True, False]
    assert (report.scored, report.no_opinion, report.failed) == (2, 1, {})
    assert report.component_counts == {"odd": 2, "long": 1}


def test_numpy_and_torch_rewards_are_numbers_too():
    import torch

    def both(completions):
        return torch.tensor([1.5, 2.5])

    batch, _ = score([both, lambda completions: [np.float32(1.0), True]], *batch_of("a", "b"))
    assert batch.rewards.tolist() == [2.5, 3.5]


def test_clipping_bounds_the_weighted_sum():
    batch, report = score(lengths, *batch_of("abcd", "a"), clip=2.0)
    assert batch.rewards.tolist() == [2.0, 1.0]
    assert report.component_means == {"lengths": 2.5}


# What fails


def test_a_function_that_raises_loses_only_the_samples_it_raises_for():
    calls = []

    def picky(completions):
        calls.append(list(completions))
        return [1 / (len(c) - 2) for c in completions]

    batch, report = score(picky, *batch_of("a", "ab", "abc"))
    np.testing.assert_array_equal(batch.rewards, [-1.0, NAN, 1.0])
    assert batch.sample_mask.tolist() == [True, False, True]
    assert (report.failed, report.failed_components, report.scored) == ({"raised": 1}, {"picky": 1}, 2)
    assert report.failed_share == pytest.approx(1 / 3)
    assert calls == [["a", "ab", "abc"], ["a"], ["ab"], ["abc"]]
    assert report.first_traceback.startswith("picky:\nTraceback (most recent call last):\n")
    assert "ZeroDivisionError: division by zero" in report.first_traceback
    assert "reward_call.py" not in report.first_traceback


@pytest.mark.parametrize(
    ("answer", "reason", "text"),
    [
        ([1.0, NAN], "not_finite", "f: got nan, expected a finite number"),
        ([1.0, math.inf], "not_finite", "f: got inf, expected a finite number"),
        ([1.0, 10**400], "not_finite", "f: got inf, expected a finite number"),
        ([1.0, "1"], "wrong_type", "f: got a str ('1'), expected a number, None or a list of numbers"),
        ([1.0, {"a": 1}], "wrong_type", "f: got a dict (\"{'a': 1}\"), expected a number, None or a list of numbers"),
        ([1.0, [1.0, None, 1.0]], "wrong_type", "f: got a list with [1.0, None, 1.0], expected numbers alone"),
        ([1.0, [0.0, NAN, 0.0]], "not_finite", "f: got a list with NaN or infinity, expected finite numbers"),
        ([1.0, [0.0, 0.0]], "wrong_length", "f: got a list of 2, expected 3 (response tokens) or 1 (turns)"),
    ],
)
def test_a_malformed_element_fails_its_own_sample_alone(answer, reason, text):
    def f(completions):
        return answer

    batch, report = score(f, *batch_of("abc", "abc"))
    np.testing.assert_array_equal(batch.rewards, [1.0, NAN])
    assert batch.sample_mask.tolist() == [True, False]
    assert (report.failed, report.first_traceback) == ({reason: 1}, text)


@pytest.mark.parametrize(
    ("answer", "reason", "text"),
    [
        ([1.0], "wrong_length", "f: got 1 rewards for 2 completions"),
        (1.0, "wrong_type", "f: got a float, expected a list with one element a sample"),
        (None, "wrong_type", "f: got a NoneType, expected a list with one element a sample"),
    ],
)
def test_a_malformed_list_fails_every_sample_and_none_becomes_zero(answer, reason, text):
    def f(completions):
        return answer

    batch, report = score(f, *batch_of("a", "b"))
    np.testing.assert_array_equal(batch.rewards, [NAN, NAN])
    assert batch.sample_mask.tolist() == [False, False]
    assert (report.failed, report.first_traceback) == ({reason: 2}, text)


def test_one_failed_component_fails_the_sample_whatever_the_others_say():
    def picky(completions):
        if "b" in completions:
            raise ValueError("no b")
        return [1.0] * len(completions)

    batch, report = score([lengths, picky], *batch_of("a", "b"))
    np.testing.assert_array_equal(batch.rewards, [2.0, NAN])
    assert report.component_means == {"lengths": 1.0, "picky": 1.0}
    assert report.component_counts == {"lengths": 2, "picky": 1}


def test_a_function_that_ends_the_process_only_fails_its_samples():
    def leave(completions):
        raise SystemExit(3)

    _, report = score(leave, *batch_of("a", "b"))
    assert report.failed == {"raised": 2}


def test_samples_masked_before_stay_masked():
    batch, prompts = batch_of("a", "b")
    scored, _ = score(lengths, replace(batch, sample_mask=np.array([False, True])), prompts)
    assert scored.sample_mask.tolist() == [False, True]


# Dense rewards


def test_one_number_a_token_stays_where_it_is_and_a_plain_reward_stands_at_the_end():
    def dense(completions):
        return [[0.0, 1.0, 0.5][: len(c)] for c in completions]

    batch, report = score([{"function": dense, "weight": 2.0}, lengths], *batch_of("abc", "ab"))
    assert batch.token_rewards.tolist() == [0.0, 2.0, 4.0, 0.0, 4.0]
    assert batch.rewards.tolist() == [6.0, 4.0]
    assert report.component_means == {"dense": 1.25, "lengths": 2.5}


def test_one_number_a_turn_is_placed_at_the_last_token_the_policy_chose_in_it():
    prompts = [Prompt("rows:0:0", np.array([7, 8], np.int32), "q")]
    batch = Batch.from_trajectories([trajectory("rows:0:0", "answer", [0, 0, -1, -1, 1, 1, 1, -1])])
    scored, _ = score(lambda completions: [[1.0, 3.0]], batch, prompts)
    assert scored.token_rewards.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0]
    assert scored.rewards.tolist() == [4.0]
    plain, _ = score([lambda completions: [[1.0, 3.0]], lambda completions: [10.0]], batch, prompts)
    assert plain.token_rewards.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 13.0, 0.0]


def test_a_reward_that_no_action_token_can_carry_is_a_failure():
    prompts = [Prompt("rows:0:0", np.array([7, 8], np.int32), "q")]
    batch = Batch.from_trajectories([trajectory("rows:0:0", "answer", [0, -1, 2])])
    on_environment, report = score(lambda completions: [[1.0, 1.0, 0.0]], batch, prompts)
    assert report.failed == {"misplaced": 1} and math.isnan(on_environment.rewards[0])
    both = Batch.from_trajectories([trajectory("rows:0:0", "answer", [0, -1, -1, 2])])
    _, report = score(lambda completions: [[1.0, 5.0, 2.0]], both, prompts)
    assert report.failed == {"misplaced": 1}
    assert "got reward 5.0 for turn 1, which has no action token" in report.first_traceback
    fine, _ = score(lambda completions: [[1.0, 0.0, 2.0]], both, prompts)
    assert fine.token_rewards.tolist() == [1.0, 0.0, 0.0, 2.0]


def test_a_failed_sample_of_a_dense_batch_has_nan_on_every_token():
    def dense(completions):
        return [[1.0, 1.0], "no"]

    batch, _ = score(dense, *batch_of("ab", "abc"))
    np.testing.assert_array_equal(batch.token_rewards, [1.0, 1.0, NAN, NAN, NAN])
    np.testing.assert_array_equal(batch.rewards, [2.0, NAN])


def test_empty_responses_bear_zero_and_nothing_else_in_a_dense_batch():
    def dense(completions):
        return [[1.0] * len(c) for c in completions]

    batch, report = score([dense, lengths], *batch_of("ab", ""))
    assert batch.rewards.tolist() == [4.0, 0.0]
    assert report.scored == 2
    batch, report = score([dense, lambda completions: [1.0, 1.0]], *batch_of("ab", ""))
    np.testing.assert_array_equal(batch.rewards, [3.0, NAN])
    assert report.failed == {"misplaced": 1}


def test_rewards_of_an_environment_are_a_component_of_their_own():
    prompts = [Prompt("rows:0:0", np.array([7, 8], np.int32), "q")]
    played = replace(trajectory("rows:0:0", "answer", [0, -1, 1]), turn_rewards=np.array([0.5, 1.0]))
    batch, report = score(lambda completions: [2.0], Batch.from_trajectories([played]), prompts)
    assert batch.token_rewards.tolist() == [0.5, 0.0, 3.0]
    assert report.component_means["environment"] == 1.5


# Time limits


def test_an_async_function_is_awaited_in_one_loop_call_after_call():
    loops = []

    async def slow(completions):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    scorer = Scorer(slow)
    first, _ = scorer.score(*batch_of("ab"))
    second, _ = scorer.score(*batch_of("abc"))
    scorer.close()
    assert (first.rewards.tolist(), second.rewards.tolist()) == ([2.0], [3.0])
    assert loops[0] is loops[1]


def test_an_async_function_that_fails_is_repeated_for_every_sample_side_by_side():
    async def picky(completions):
        await asyncio.sleep(0.3)
        if "b" in completions:
            raise ValueError("no b")
        return [1.0] * len(completions)

    start = time.monotonic()
    batch, report = score(picky, *batch_of("a", "b", "c", "d", "e", "f"), timeout_seconds=2.0)
    assert time.monotonic() - start < 1.5
    np.testing.assert_array_equal(batch.rewards, [1.0, NAN, 1.0, 1.0, 1.0, 1.0])
    assert report.failed == {"raised": 1}


def test_an_async_function_past_its_limit_is_cancelled_and_leaves_no_thread():
    async def hang(completions):
        if "b" in completions:
            await asyncio.sleep(60)
        return [1.0] * len(completions)

    batch, report = score(hang, *batch_of("a", "b"), timeout_seconds=0.3)
    np.testing.assert_array_equal(batch.rewards, [1.0, NAN])
    assert (report.failed, report.hung_threads) == ({"timeout": 1}, 0)
    assert report.first_traceback == "hang: no answer within 0.3 s"


def test_a_function_that_blocks_is_left_behind_and_costs_only_its_own_sample():
    release = threading.Event()

    def hang(completions):
        if "b" in completions:
            release.wait(60)
        return [1.0] * len(completions)

    start = time.monotonic()
    batch, report = score(hang, *batch_of("a", "b", "c"), timeout_seconds=0.4)
    assert time.monotonic() - start < 2.0
    np.testing.assert_array_equal(batch.rewards, [1.0, NAN, 1.0])
    assert report.failed == {"timeout": 1}
    assert "its thread is left behind" in report.first_traceback
    assert report.hung_threads == 2  # the call of all three, and the repeated one of the second
    release.set()


def test_a_function_that_always_blocks_is_refused_before_its_threads_pile_up():
    release = threading.Event()

    def hang(completions):
        release.wait(60)
        return [1.0] * len(completions)

    scorer = Scorer(hang, timeout_seconds=0.1)
    batch, prompts = batch_of(*"abcdefgh")
    reports = [scorer.score(batch, prompts)[1] for _ in range(3)]
    assert [sum(r.failed.values()) for r in reports] == [8, 8, 8]
    assert [r.hung_threads for r in reports] == [5, 8, 8]
    assert reports[2].failed == {"hung": 8}
    assert "8 earlier calls are still busy past their time limit" in reports[2].first_traceback
    release.set()
    deadline = time.monotonic() + 10
    while scorer.components["hang"].hung and time.monotonic() < deadline:
        time.sleep(0.01)
    again, _ = scorer.score(batch, prompts)
    assert again.rewards.tolist() == [1.0] * 8
    scorer.close()


def test_a_time_out_of_the_functions_own_is_its_error_and_not_ours():
    def own(completions):
        raise TimeoutError("database")

    _, report = score(own, *batch_of("a"))
    assert report.failed == {"raised": 1}
    assert "TimeoutError: database" in report.first_traceback


def test_components_are_asked_side_by_side():
    def slow(completions):
        time.sleep(0.4)
        return [1.0] * len(completions)

    start = time.monotonic()
    score([slow, slow, slow], *batch_of("a"))
    assert time.monotonic() - start < 1.0


# Entries


def test_functions_are_found_by_file_by_dotted_path_and_by_verifier_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def short(completions, limit=3, **columns):\n    return [float(len(c) < limit) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    entries = [
        {"function": "mine.py:short", "params": {"limit": 2}},
        "apportion.data.verifiers.exact_match",
        "numeric_match",
    ]
    batch, report = score(entries, *batch_of("0", "the 1"))
    assert batch.rewards.tolist() == [3.0, 1.0]
    assert report.component_means == {"short": 0.5, "exact_match": 0.5, "numeric_match": 1.0}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("numeric_mach", "expected package.module:function, file.py:function or one of exact_match"),
        ("numeric_mach", "did you mean 'numeric_match'?"),
        ("nowhere.py:f", "no file"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("math:squrt", "math has no 'squrt' (did you mean 'sqrt'?)"),
        ({"function": "numeric_match", "wieght": 2}, "got key 'wieght'"),
        ({"function": "numeric_match", "weight": math.nan}, "got weight nan, expected a number"),
        ({"function": "numeric_match", "timeout_seconds": 0}, "got timeout_seconds 0, expected above 0"),
        ({"function": "f.py:g", "urls": ["http://a"]}, "expected one of the two"),
        ({"urls": ["nonsense"]}, "expected http://host:port/path"),
        (
            {"function": "http://h/score", "auth_env": "APPORTION_TEST_UNSET"},
            "APPORTION_TEST_UNSET (auth_env) is not set",
        ),
        (7, "got 7, expected a function's name"),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused_in_one_line(entry, message):
    with pytest.raises(ConfigError) as caught:
        Scorer([entry])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_on_import_is_named_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(
        ConfigError, match=r"cannot be imported .ModuleNotFoundError: No module named 'not_installed_any"
    ):
        Scorer(f"{tmp_path / 'broken.py'}:f")


def test_params_that_a_function_does_not_take_are_refused():
    def f(completions, limit=1):
        return [1.0]

    with pytest.raises(ConfigError, match=r"got params key 'limti', the function has none .did you mean 'limit'"):
        Scorer({"function": f, "params": {"limti": 2}})


def test_missing_and_reserved_columns_are_found_before_a_run():
    _, prompts = batch_of("a")
    scorer = Scorer("gym")
    with pytest.raises(ConfigError, match="gym: needs 'task', 'entry', 'task_parameters', the data has columns answer"):
        scorer.check_columns(prompts)
    Scorer("numeric_match").check_columns(prompts)
    prompts[0].columns["completions"] = "x"
    with pytest.raises(ConfigError, match="got a column named 'completions'"):
        Scorer("numeric_match").check_columns(prompts)


def test_reports_of_shards_merge_into_one():
    _, first = score(lengths, *batch_of("a", "abc"))
    _, second = score(lambda completions: [None, "x"], *batch_of("a", "b"))
    whole = ScoreReport.merge([first, second])
    assert (whole.samples, whole.scored, whole.no_opinion, whole.failed) == (4, 2, 1, {"wrong_type": 1})
    assert whole.component_means["lengths"] == 2.0
    assert math.isnan(whole.component_means["<lambda>"])
    assert whole.first_traceback == second.first_traceback


# Services


class Service:
    """A server on this machine that answers with `reply(body) -> (status, bytes)` and keeps what it was asked."""

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
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

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
        ((200, b"oops"), "the answer is not JSON of the form {'rewards': [...]}"),
        ((200, b'{"scores": []}'), "the answer is not JSON of the form {'rewards': [...]}"),
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


def test_a_service_that_is_too_slow_fails_its_samples_in_time(serve):
    def slow(body):
        time.sleep(1.0)
        return lengths_reply(body)

    start = time.monotonic()
    _, report = score({"function": serve(slow).url, "timeout_seconds": 0.3}, *batch_of("a"))
    assert time.monotonic() - start < 0.9
    assert report.failed == {"timeout": 1}


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


# Reward models


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A random one-label Llama on the tiny model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from apportion.data.prompts import load_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPORTION_CACHE", str(tmp_path_factory.mktemp("cache")))
        tokenizer = load_tokenizer("builtin:tiny")
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=0,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward_model")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected_logit(folder, ids) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def test_a_reward_model_with_the_policys_vocabulary_reads_the_sampled_ids(reward_model):
    batch, prompts = batch_of("a", "abcde", "abc")
    scored, report = score(
        {"function": f"model:{reward_model}", "batch_size": 2}, batch, prompts, tokenizer=str(reward_model)
    )
    wanted = [expected_logit(reward_model, batch.sequence(i).tolist()) for i in range(3)]
    np.testing.assert_allclose(scored.rewards, wanted, atol=1e-5)
    assert len(set(wanted)) == 3
    assert report.component_counts == {"reward_model": 3}


def test_a_reward_model_of_another_tokenizer_reads_the_text_through_its_own_template(reward_model):
    from transformers import AutoTokenizer

    scored, _ = score(f"model:{reward_model}", *batch_of("yes"))
    ids = AutoTokenizer.from_pretrained(reward_model)("<|user|>q0<|end|><|assistant|>yes<|end|>")["input_ids"]
    np.testing.assert_allclose(scored.rewards, [expected_logit(reward_model, ids)], atol=1e-5)


def test_a_sequence_past_the_reward_models_context_fails_alone(reward_model):
    scored, report = score(f"model:{reward_model}", *batch_of("yes", "x" * 40), tokenizer=str(reward_model))
    assert scored.sample_mask.tolist() == [True, False]
    assert report.first_traceback == "reward_model: got 42 tokens, the model takes 32"


def test_a_model_that_is_no_reward_model_is_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got a model with 3 labels, expected 1"):
        Scorer(f"model:{tmp_path}")
    with pytest.raises(ConfigError, match="could not be loaded"):
        Scorer(f"model:{tmp_path / 'nowhere'}")
