"""Ready-made verifiers that can keep the interpreter run in a child process, whose time limit holds by killing it."""

import os
import signal
import time

import numpy as np
import pytest
from scoring_parts import NAN, batch_of

from apportion.actors import reward_process
from apportion.actors.scoring import Scorer

pytestmark = pytest.mark.slow

ENDLESS = "$9^{9^{9}}$"  # what math-verify never works out
BACKTRACKING = "a" * 60 + "b"  # what (a+)+$ tries 2 ** 60 ways on


@pytest.fixture
def verifier():
    """Score texts against answers by a verifier that stays, warm, from call to call."""
    scorers = []

    def made(entry, **options):
        scorer = Scorer(entry, **options)
        scorers.append(scorer)

        def score(*pairs):
            batch, prompts = batch_of(*(text for text, _ in pairs))
            for prompt, (_, answer) in zip(prompts, pairs, strict=True):
                prompt.columns["answer"] = answer
            start = time.monotonic()
            scored, report = scorer.score(batch, prompts)
            return scored.rewards, report, time.monotonic() - start

        return score, next(iter(scorer.components.values()))

    yield made
    for scorer in scorers:
        scorer.close()


def test_an_expression_without_end_costs_its_own_sample_alone_and_the_limit_holds(verifier):
    score, source = verifier("math_verify", timeout_seconds=4.0)
    rewards, report, seconds = score(("$1$", "1"), (ENDLESS, "3"), ("$2$", "2"), ("5", "4"))
    np.testing.assert_array_equal(rewards, [1.0, NAN, 1.0, 0.0])
    assert report.failed == {"timeout": 1} and report.hung_threads == 0
    assert report.first_traceback.startswith("math_verify: no answer within ")
    assert report.first_traceback.endswith("its process is killed")
    assert source._child.alive and seconds < 60  # 1 s of it waiting; the rest starts two children


def test_a_sample_alone_has_the_whole_limit_and_the_next_call_starts_anew(verifier):
    score, source = verifier("math_verify", timeout_seconds=0.8)
    assert score(("$1$", "1"))[0].tolist() == [1.0]
    child = source._child._process
    rewards, report, seconds = score((ENDLESS, "3"))
    assert np.isnan(rewards).all() and report.failed == {"timeout": 1}
    assert 0.8 <= seconds < 5.0
    assert child.poll() == -signal.SIGKILL and source._child is None
    assert score(("$1$", "1"))[0].tolist() == [1.0]


@pytest.mark.parametrize(
    "entry",
    [
        {"function": "regex_match", "params": {"pattern": "(a+)+$"}},
        {"function": "format", "params": {"pattern": "(a+)+$"}},
    ],
)
def test_a_pattern_that_backtracks_costs_its_own_sample_alone(verifier, entry):
    score, _ = verifier(entry | {"timeout_seconds": 2.0})
    rewards, report, _ = score(("aaa", ""), (BACKTRACKING, ""), ("b", ""), ("aa", ""))
    np.testing.assert_array_equal(rewards, [1.0, NAN, 0.0, 1.0])
    assert report.failed == {"timeout": 1}


def test_one_child_serves_call_after_call(verifier):
    score, source = verifier({"function": "regex_match", "params": {"pattern": "a"}})
    assert score(*[("a", ""), ("b", "")] * 32)[0].tolist() == [1.0, 0.0] * 32
    child = source._child
    assert score(("b", ""), ("a", ""))[0].tolist() == [0.0, 1.0]
    assert source._child is child


def test_what_a_verifier_raises_fails_its_own_sample_with_its_traceback_and_keeps_the_child(verifier):
    score, source = verifier("math_verify")
    rewards, report, _ = score(("$1$", "1"), ("$1$", ""), ("$2$", "2"))
    np.testing.assert_array_equal(rewards, [1.0, NAN, 1.0])
    assert report.failed == {"raised": 1}
    assert "DataError: answer: got '', expected a mathematical expression" in report.first_traceback
    assert "reward_child" not in report.first_traceback and source._child.alive


def test_a_child_that_dies_over_a_sample_fails_it_and_one_that_died_idle_is_replaced(verifier, monkeypatch):
    score, source = verifier({"function": "regex_match", "params": {"pattern": "a"}})
    assert score(("a", ""))[0].tolist() == [1.0]
    os.kill(source._child._process.pid, signal.SIGKILL)
    source._child._process.wait()
    assert score(("a", ""), ("b", ""))[0].tolist() == [1.0, 0.0]

    send = reward_process._Child.send

    def send_and_die(child, message):
        monkeypatch.setattr(reward_process._Child, "send", send)
        child._process.kill()

    monkeypatch.setattr(reward_process._Child, "send", send_and_die)
    rewards, report, _ = score(("a", ""), ("b", ""))
    np.testing.assert_array_equal(rewards, [NAN, 0.0])
    assert report.failed == {"died": 1}
    assert report.first_traceback == "regex_match: its process ended with exit code -9, expected an answer"


def test_a_call_that_loses_too_many_children_gives_the_rest_up(verifier, monkeypatch):
    monkeypatch.setattr(reward_process, "MOST_LOST", 2)
    score, source = verifier({"function": "regex_match", "params": {"pattern": "(a+)+$"}, "timeout_seconds": 1.0})
    rewards, report, _ = score(("a", ""), (BACKTRACKING, ""), (BACKTRACKING, ""), ("a", ""), ("b", ""))
    np.testing.assert_array_equal(rewards, [1.0, NAN, NAN, NAN, NAN])
    assert report.failed == {"timeout": 4} and source._child is None
    assert score(("a", ""))[0].tolist() == [1.0]


def test_closing_a_scorer_ends_the_child(verifier):
    score, source = verifier({"function": "regex_match", "params": {"pattern": "a"}})
    score(("a", ""))
    child = source._child._process
    source.close()
    assert child.poll() == -signal.SIGKILL


def test_a_gym_answer_is_scored_by_the_task_in_the_child():
    from apportion.data.sources import load_sources

    [source] = load_sources({"source": "gym:chain_sum", "size": 1, "max_terms": 3})
    values = source.rows[0].values
    scorer = Scorer("gym")
    batch, prompts = batch_of(f"<answer>{values['answer']}</answer>", "<answer>no number</answer>")
    for prompt in prompts:
        prompt.columns |= {name: values[name] for name in ("task", "entry", "task_parameters")}
    scored, report = scorer.score(batch, prompts)
    scorer.close()
    assert scored.rewards.tolist() == [1.0, 0.0] and not report.failed
