"""Rewards that fail: what raises, what is malformed, what is late, and how that is counted."""

import asyncio
import math
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from scoring_parts import NAN, batch_of, lengths, score

from apportion.actors.scoring import Scorer

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


ENDS = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), BaseException("odd")]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_function_that_would_end_the_process_only_fails_its_samples(end, is_async, one_by_one):
    def leave(completions):
        if "b" in completions:
            raise end
        return [1.0] * len(completions)

    async def leave_later(completions):
        await asyncio.sleep(0)
        return leave(completions)

    entry = {"function": leave_later if is_async else leave, "one_by_one": one_by_one}
    batch, report = score(entry, *batch_of("a", "b", "c"))
    np.testing.assert_array_equal(batch.rewards, [1.0, NAN, 1.0])
    assert report.failed == {"raised": 1}
    assert report.first_traceback.startswith("leave")
    assert type(end).__name__ in report.first_traceback.splitlines()[-1]


def test_an_interrupt_of_the_calling_thread_still_ends_the_call():
    def slow(completions):
        signal.raise_signal(signal.SIGINT)  # the kernel gives it to the main thread, which waits for this one
        time.sleep(1.0)
        return [1.0] * len(completions)

    with pytest.raises(KeyboardInterrupt):
        score(slow, *batch_of("a"))


def test_samples_masked_before_stay_masked():
    batch, prompts = batch_of("a", "b")
    scored, _ = score(lengths, replace(batch, sample_mask=np.array([False, True])), prompts)
    assert scored.sample_mask.tolist() == [False, True]


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
