"""A reward service or a judge that is away is waited for, within its budget, with a line at each end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scoring_parts import batch_of

from apportion.actors import judge_client, outage, reward_service
from apportion.actors.judge_client import Case, ServiceJudge, ServiceJudgeSpec
from apportion.actors.outage import Outage
from apportion.actors.reward_check import check_outages
from apportion.actors.reward_service import ServiceSource
from apportion.actors.scoring import Scorer
from apportion.platform.errors import ConfigError
from apportion.platform.notices import Notices, notify


class Clock:
    """Seconds that pass only in pauses, and when a request says so."""

    def __init__(self) -> None:
        self.now, self.pauses = 1000.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(round(seconds, 3))


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (outage, reward_service, judge_client):
        monkeypatch.setattr(module, "time", made)
    return made


def test_pauses_grow_up_to_half_a_minute_and_end_with_the_budget(clock):
    said: list[str] = []
    away = Outage("service s at http://h/r", "reward.outage_seconds", 100.0, said.append)
    started = clock.now
    while away.wait("http://h/r: ConnectError", started):
        pass
    assert clock.now == started + 100 and max(clock.pauses) <= 30.0
    assert clock.pauses[:6] == [1.0, 1.0, 1.0, 1.5, 2.25, 3.375]
    assert said == [
        "service s at http://h/r is away (http://h/r: ConnectError); waiting up to 100 s for it (reward.outage_seconds), "
        "then its samples fail",
        "service s at http://h/r is still away after 100 s (http://h/r: ConnectError); its samples fail until it answers",
    ]
    assert not away.wait("still", clock.now) and len(said) == 2  # not waited for again
    away.answered()
    away.answered()
    assert said[2:] == ["service s at http://h/r answers again"]
    assert away.wait("again", clock.now) and said[3].startswith("service s at http://h/r is away (again)")
    clock.now += 41
    away.answered()
    assert said[4] == "service s at http://h/r answers again after 42 s"
    assert not Outage("s", "k", 0.0, said.append).wait("x", 0.0) and len(said) == 5
    assert not Outage("s", "k", 50.0, said.append).wait("x", clock.now, until=clock.now)  # another limit comes first


class Source(ServiceSource):
    """A service without a network: `replies` says what each request gets, in order; the last one holds on."""

    def _attempt(self, url, content, expected, deadline):
        prompts = json.loads(content)["prompts"]
        self.asked.append(prompts)
        reply = self.reply(prompts)
        if isinstance(reply, str):
            reward_service.check_status(int(reply.partition("status ")[2] or 200), "http://h/r")
            raise ConnectionError(f"http://h/r: {reply}")
        return reply


@pytest.fixture
def scored(clock, monkeypatch):
    """Scores prompts by a service that `reply(prompts)` stands for; the report, the rewards, what was said and asked."""

    def scored(reply, *texts, outage_seconds=60.0, batch_size=None):
        said: list[str] = []
        entry = {"function": "http://me:sesame@h/r?key=sesame", "name": "s", "retries": 0, "batch_size": batch_size}
        scorer = Scorer(entry)
        source = scorer.components["s"]
        source.__class__, source.asked, source.reply = Source, [], reply
        source.wait_by_default(outage_seconds)
        source.outage._say = said.append
        batch, report = scorer.score(*batch_of(*texts))
        return SimpleNamespace(rewards=batch.rewards, report=report, said=said, asked=source.asked, scorer=scorer)

    return scored


def test_samples_of_a_service_that_comes_back_have_their_rewards(scored, clock):
    started = clock.now
    found = scored(lambda prompts: [1.0] * len(prompts) if clock.now >= started + 20 else "status 503", "a", "b")
    np.testing.assert_array_equal(found.rewards, [1.0, 1.0])
    assert found.report.failed == {} and len(found.said) == 2
    assert found.said[0].startswith(
        "reward service s at http://h/r is away (http://h/r: status 503); waiting up to 60 s"
    )
    assert found.said[1].startswith("reward service s at http://h/r answers again after 2")
    assert "sesame" not in "".join(found.said)


def test_past_the_budget_samples_fail_with_the_services_name_address_and_last_error(scored):
    found = scored(lambda prompts: "ConnectError", "a", "b")
    assert found.report.failed == {"away": 2} and "sesame" not in found.report.first_traceback
    assert found.report.first_traceback == (
        "s: 1 attempts failed; last: http://h/r: ConnectError; it was waited for as long as reward.outage_seconds allows"
    )
    asked = len(found.asked)
    found.scorer.score(*batch_of("a", "b"))
    assert len(found.asked) == asked + 1  # later calls do not wait until it has answered


def test_a_service_that_answers_others_is_not_away(scored, clock):
    started = clock.now
    found = scored(lambda prompts: "status 500", "a", outage_seconds=0.0)
    assert found.report.failed == {"service": 1} and found.said == []
    count, replies = iter(range(9)), {0: [1.0], 1: "status 503", 2: [2.0]}  # the third is the probe
    found = scored(lambda prompts: replies[next(count)], "a", "b", batch_size=1)
    assert np.isnan(found.rewards).sum() == 1 and np.nansum(found.rewards) == 1.0
    assert found.report.failed == {"service": 1} and found.said == [] and clock.now == started


def test_a_service_that_fails_on_a_request_is_not_waited_for(scored, clock):
    started = clock.now
    found = scored(lambda prompts: "status 500", "a")  # the only request of the call
    assert found.report.failed == {"service": 1} and found.said == [] and clock.now == started
    assert found.report.first_traceback == "s: 1 attempts failed; last: http://h/r: status 500"
    found = scored(lambda prompts: "status 500" if prompts == ["q1"] else [1.0], "a", "b", "c", batch_size=1)
    np.testing.assert_array_equal(found.rewards, [1.0, np.nan, 1.0])
    assert found.report.failed == {"service": 1} and found.said == [] and clock.now == started
    source = found.scorer.components["s"]
    source._retries, replies = 2, iter(["ConnectError", "status 500", "status 503"])  # one of two addresses is there
    source.reply = lambda prompts: next(replies)
    _, report = found.scorer.score(*batch_of("a"))
    assert report.failed == {"service": 1} and found.said == [] and clock.now < started + 1


def test_a_service_that_leaves_in_the_middle_of_a_call_is_waited_for(scored, clock):
    started, count = clock.now, iter(range(999))

    def reply(prompts):
        return [1.0] if next(count) == 0 or clock.now > started + 9 else "ConnectError"

    found = scored(reply, "a", "b", "c", batch_size=1)
    np.testing.assert_array_equal(found.rewards, [1.0, 1.0, 1.0])
    assert len(found.said) == 2


def test_a_judge_that_is_away_is_waited_for_within_its_batchs_time(clock, monkeypatch):
    spec = ServiceJudgeSpec(["http://me:sesame@h/v1"], "j", None, 0.5, 16, 999, 5.0, 0, 2, outage_seconds=40.0)
    judge, said = ServiceJudge(spec, len), []
    judge.outage._say = said.append
    started = clock.now

    def attempt(url, content, deadline):
        if clock.now < started + 30:
            raise ConnectionError("http://h/v1: ConnectError")
        return "[1]", "stop"

    monkeypatch.setattr(judge, "_attempt", attempt)
    cases = [Case("q", ["a", "b"], None)]
    [[critique]] = judge.ask(cases, 1, clock.now + 1e9)
    assert critique.wrong_steps == [0]
    assert said[0].startswith(
        "judge j at http://h/v1 is away (http://h/v1: ConnectError); waiting up to 40 s for it (judge."
    )
    assert said[1].startswith("judge j at http://h/v1 answers again after 3")
    started = clock.now + 1e6
    [[critique]] = judge.ask(cases, 1, clock.now + 1e9)
    assert critique.failure == "down" and "is still away after 40 s" in said[3]


def test_a_judge_that_fails_on_a_request_is_not_waited_for(clock, monkeypatch):
    judge, said = ServiceJudge(ServiceJudgeSpec(["http://h/v1"], "j", None, 0.5, 16, 999, 5.0, 0, 2, 40.0), len), []
    judge.outage._say = said.append
    monkeypatch.setattr(
        judge, "_attempt", lambda url, content, deadline: reward_service.check_status(500, "http://h/v1")
    )
    started = clock.now
    [[critique]] = judge.ask([Case("q", ["a"], None)], 1, clock.now + 1e9)
    assert critique.failure == "refused" and critique.detail == "no critique; last: http://h/v1: status 500"
    assert said == [] and clock.now == started


def test_a_calls_limit_that_would_end_the_wait_is_refused():
    check_outages("http://h/r", 60.0, 600.0, 1800.0)
    check_outages(["numeric_match", "model:x"], 60.0, 6000.0, 1800.0)
    check_outages({"function": "http://h/r", "outage_seconds": 0}, 60.0, 6000.0, 1800.0)
    for entries in ("http://me:sesame@h/r", {"urls": ["http://h/r"], "outage_seconds": 1680}):
        with pytest.raises(
            ConfigError, match=r"^reward.outage_seconds: got 1680 for the service at h, .*seconds=1800, which"
        ):
            check_outages(entries, 60.0, 1680.0, 1800.0)


def test_a_line_of_an_actor_is_shown_by_whoever_waits_for_it(tmp_path, monkeypatch):
    shown: list[str] = []
    monkeypatch.setenv("APPORTION_LOG", str(tmp_path / "reward-0.log"))
    notify("of an earlier life")
    notices = Notices(shown.append)
    notices.tell()
    notices.follow(tmp_path)
    notices.tell()
    assert shown == []
    notify("service s is away\n(x)")
    notify("and back")
    notices.tell()
    notices.tell()
    assert shown == ["service s is away (x)", "and back"]
