"""Services that misbehave: each ends in rewards, or in failures that say why in one line, in time and in little memory.

APPORTION_FUZZ=N tries N mixtures; the same number gives the same cases.
"""

import random
import resource
import time

import numpy as np
import pytest
from fuzz import cases
from fuzz.hostile_services import BROKEN, KINDS, SOUND, UNTIL_LATE, HostileService
from scoring_parts import batch_of

from apportion.actors.judge_client import ANSWERED, Case, ServiceJudge, ServiceJudgeSpec
from apportion.actors.scoring import Scorer

MOST_MIB = 100
# What a reward's failure may be: of the whole request, or of one element.
REASONS = {"service", "timeout", "wrong_type", "wrong_length", "not_finite"}


def grown_mib(since):
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - since) / 1024


def scored(service, limit, retries):
    """Rewards and failures of two samples. The address has secrets in it."""
    url = f"http://me:sesame@127.0.0.1:{service.port}/score?key=sesame"
    scorer = Scorer({"function": url, "name": "s", "timeout_seconds": limit, "retries": retries})
    batch, report = scorer.score(*batch_of("ab", "cd"))
    scorer.close()
    return batch.rewards, report


def judged(service, limit, retries):
    spec = ServiceJudgeSpec(
        [f"http://me:sesame@127.0.0.1:{service.port}/v1?key=sesame"],
        "j",
        None,
        0.5,
        64,
        4096,
        limit,
        retries,
        2,
    )
    judge = ServiceJudge(spec, len)
    [[critique]] = judge.ask([Case("q", ["a", "b"], None)], 1, time.monotonic() + 60)
    judge.close()
    return critique


def one_line(text):
    assert "\n" not in text and len(text) < 500 and "sesame" not in text and "Error(" not in text, text
    assert all(c.isprintable() for c in text), text


def check_rewards(service, limit, retries=0):
    before = time.monotonic()
    rewards, report = scored(service, limit, retries)
    assert time.monotonic() - before < limit + 10
    assert set(report.failed) <= REASONS and sum(report.failed.values()) == np.isnan(rewards).sum()
    if report.failed:
        one_line(report.first_traceback)
        assert report.first_traceback.startswith("s: ")
    return rewards


def check_critique(service, limit, retries=0):
    before = time.monotonic()
    critique = judged(service, limit, retries)
    assert time.monotonic() - before < limit + 10
    assert critique.failure in (*ANSWERED, "slow", "down", "refused", "malformed")
    one_line(critique.detail)
    assert critique.failure in ANSWERED or critique.detail
    return critique


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_answer_is_read_however_it_is_sent(kind):
    with HostileService([kind]) as service:
        assert check_rewards(service, 20.0).tolist() == [1.0, 0.5]
        assert b"\r\nAuthorization: Basic bWU6c2VzYW1l\r\n" in service.asked[0] + b"\r\n"


@pytest.mark.slow
def test_every_kind_of_broken_answer_is_a_failure_in_one_line():
    since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in BROKEN:
        late = kind in UNTIL_LATE
        with HostileService([kind]) as service:
            check_rewards(service, 0.2 if late else 20.0)
            critique = check_critique(service, 0.2 if late else 20.0)
            assert critique.wrong_steps is None and (critique.failure == "slow") == late, kind
            # No redirect is followed, no refusal asked again; a busy machine may not get as far as asking.
            assert len(service.asked) == 2 or late, kind
        assert grown_mib(since) < MOST_MIB, kind


@pytest.mark.timeout(14400)
def test_a_mixture_of_answers_ends_in_rewards_or_failures():
    since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in cases(12):
        draw = random.Random(seed)
        kinds = draw.sample(sorted(KINDS), draw.randint(1, 4))
        check = check_rewards if draw.random() < 0.7 else check_critique
        with HostileService(kinds, seed) as service:
            check(service, 0.5, draw.choice((0, 1, 3)))
        assert grown_mib(since) < MOST_MIB, (seed, kinds)
