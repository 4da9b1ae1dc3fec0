"""What failed in a step's data is counted, said once, and stops the run above its limits."""

from __future__ import annotations

from collections import Counter

import pytest

from apportion.actors.failure_kinds import MOST_KINDS, first_of_each_kind, kind_of
from apportion.actors.judge import JudgeReport
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.loop.failures import Failures
from apportion.platform.errors import ApportionError, RewardError


def scored(failed: int, traceback: str | None = None) -> ScoreReport:
    report = ScoreReport(samples=8, scored=8 - failed, failed=Counter(raised=failed))
    report.first_traceback = traceback
    report.kinds = first_of_each_kind([traceback] if traceback else [])
    return report


def test_rewards_that_fail_are_counted_and_their_first_traceback_is_said_once():
    warned: list[str] = []
    failures = Failures(0.5, 0.5, warned.append)
    failures.count_rewards(scored(2, "first"))
    failures.count_rewards(scored(4, "first"))
    failures.check()
    assert failures.totals.means()["reward/failed_share"] == 6 / 16
    assert warned == ["a reward failed; its samples are masked and counted:\nfirst"]
    failures.new_step()
    failures.count_rewards(scored(5, "third"))
    warned.pop()  # another kind
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
    reports[1].first_failure, reports[1].kinds = "it raised", {"raised": "it raised"}
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
    assert failures.totals.means() == {
        "reward/failed_share": 0.25, "reward/failed/raised": 0.25, "reward/no_opinion_share": 0.75
    }  # fmt: skip
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


def raised(error: str, line: int = 3) -> str:
    return f'f:\nTraceback (most recent call last):\n  File "f.py", line {line}, in f\n    g()\n{error}'


def test_each_new_kind_of_failure_is_said_once_and_values_do_not_make_a_kind():
    warned: list[str] = []
    failures = Failures(1.0, 1.0, warned.append)
    texts = [
        raised("ValueError: 3"),
        raised("ValueError: 4", 9),
        raised("KeyError: 'a'"),
        "f: got 3, expected 4",
        "f: got 5, expected 4",
    ]
    for text in texts:
        failures.new_step()
        failures.count_rewards(scored(1, text))
    assert warned == [f"a reward failed; its samples are masked and counted:\n{texts[i]}" for i in (0, 2, 3)]
    report = JudgeReport(critiques=4, failed=Counter(down=1, slow=1), kinds={"down ": "a", "slow ": "b"})
    failures.count_critiques(report)
    failures.count_critiques(report)
    assert warned[3:] == ["judge: a", "judge: b"]


def test_kinds_are_bounded_and_the_end_of_saying_is_said():
    warned: list[str] = []
    failures = Failures(1.0, 1.0, warned.append)
    for i in range(MOST_KINDS + 9):
        failures.count_rewards(scored(1, raised(f"Odd{i}Error")))
    assert len(warned) == MOST_KINDS + 1
    assert warned[-1] == (
        f"more than {MOST_KINDS} kinds of failures; further kinds are counted in the metrics and not shown"
    )
    assert len(first_of_each_kind(raised(f"Odd{i}Error") for i in range(99))) == MOST_KINDS


def test_a_kind_is_the_exception_that_ended_a_traceback_whatever_its_message_holds():
    chained = (
        raised("ValueError: 1") + "\n\nThe above exception ...:\n\n  File 'x'\n    h()\nmy.own.Error: got\n two lines"
    )
    assert kind_of(chained) == "f: my.own.Error"
    assert kind_of("step:\n  File 'x'\n    h()\nKeyboardInterrupt\n") == "step: KeyboardInterrupt"
    assert kind_of("f: no answer within 0.3 s") == kind_of("f: no answer within 12 s") == "f: no answer within _ s"


def test_failed_rewards_are_shares_of_the_steps_samples_by_reason():
    failures = Failures(1.0, 1.0, lambda text: None)
    failures.count_rewards(ScoreReport(samples=8, failed=Counter(raised=2)))
    failures.count_rewards(ScoreReport(samples=8))
    failures.count_rewards(ScoreReport(samples=8, failed=Counter(timeout=3, raised=1)))
    assert {n: v for n, v in failures.totals.means().items() if n.startswith("reward/failed")} == {
        "reward/failed_share": 6 / 24, "reward/failed/raised": 3 / 24, "reward/failed/timeout": 3 / 24,
    }  # fmt: skip
    failures.new_step()
    failures.count_rewards(ScoreReport(samples=8))
    assert "reward/failed/raised" not in failures.totals.means()


def test_a_step_without_rewards_says_the_first_failure():
    failures = Failures(1.0, 0.5, lambda text: None)
    failures.count_rewards(scored(8, "service: no answer"))
    with pytest.raises(RewardError, match=r"rows out that they say None to; the first failure:\nservice: no answer$"):
        failures.check_groups(0, rewarded=0.0)
