"""What failed in a step's data is counted, said once, and stops the run above its limits."""

from __future__ import annotations

from collections import Counter

import pytest

from apportion.actors.judge import JudgeReport
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.loop.failures import Failures
from apportion.platform.errors import ApportionError, RewardError


def scored(failed: int, traceback: str | None = None) -> ScoreReport:
    report = ScoreReport(samples=8, scored=8 - failed, failed=Counter(raised=failed))
    report.first_traceback = traceback
    return report


def test_rewards_that_fail_are_counted_and_their_first_traceback_is_said_once():
    warned: list[str] = []
    failures = Failures(0.5, 0.5, warned.append)
    failures.count_rewards(scored(2, "first"))
    failures.count_rewards(scored(4, "second"))
    failures.check()
    assert failures.totals.means()["reward/failed_share"] == 6 / 16
    assert warned == ["a reward failed; its samples are masked and counted:\nfirst"]
    failures.new_step()
    failures.count_rewards(scored(5, "third"))
    with pytest.raises(RewardError) as stopped:
        failures.check()
    assert str(stopped.value) == (
        "reward: 62% of this step's samples failed, expected at most 50% (reward.max_failed_share); "
        "the first failure:\nthird"
    )
    assert len(warned) == 1


def test_episodes_that_fail_are_counted_and_the_seconds_that_their_environments_took():
    warned: list[str] = []
    failures = Failures(0.5, 0.5, warned.append)
    reports = [RolloutReport(1.0, 10, 4) for _ in range(2)]
    reports[0].environment_failures, reports[1].environment_failures = 1, 2
    reports[1].first_failure = "it raised"
    failures.count_episodes(reports, 0.5)
    assert failures.totals.sums == {"rollout/environment_failures": 3, "rollout/environment_seconds": 0.5}
    assert warned == ["an environment failed; its episodes are masked and counted:\nit raised"]


def test_the_first_failed_critique_of_the_step_is_named_and_a_step_without_any_is_fine():
    failures = Failures(0.1, 0.5, lambda text: None)
    failures.count_rewards(scored(0))
    failures.count_critiques(JudgeReport(critiques=4, failed=Counter(down=3), first_failure="a critique is down: h"))
    with pytest.raises(ApportionError, match=r"judge: 75% .* at most 50% .*; the first: a critique is down: h$"):
        failures.check()
    failures.new_step()
    failures.count_rewards(scored(0))
    failures.count_critiques(JudgeReport(critiques=4, failed=Counter(slow=2), first_failure="a critique is slow: h"))
    failures.check()


def unscored(no_opinion: int, failed: int) -> Failures:
    failures = Failures(1.0, 0.5, lambda text: None)
    failures.count_rewards(ScoreReport(samples=8, no_opinion=no_opinion, failed=Counter(raised=failed)))
    return failures


def test_a_step_that_no_reward_has_an_opinion_of_is_not_blamed_on_selection():
    failures = unscored(6, 2)
    assert failures.totals.means() == {"reward/failed_share": 0.25, "reward/no_opinion_share": 0.75}
    with pytest.raises(RewardError) as stopped:
        failures.check_groups(0, rewarded=0.0)
    assert str(stopped.value) == (
        "reward: no sample of this step has a reward (75% no opinion, 25% failed), expected some; let reward.functions "
        "return a number, or leave rows out that they say None to"
    )


def test_where_samples_have_rewards_selection_is_what_left_no_group_and_a_group_is_enough():
    failures = unscored(6, 0)
    with pytest.raises(RewardError, match=r"^selection: no group of this step is left to train on"):
        failures.check_groups(0, rewarded=2.0)
    failures.check_groups(1, rewarded=2.0)
