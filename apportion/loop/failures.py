"""What failed in a step's data: counted, each kind said once, and too much where it passes the run's limits."""

from __future__ import annotations

from collections.abc import Callable

from apportion.actors.failure_kinds import MOST_KINDS
from apportion.actors.judge import JudgeReport
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.batch import Totals
from apportion.platform.errors import RewardError


class Failures:
    """Rewards, episodes and critiques of one step after the other. `totals` are those of the step."""

    def __init__(self, max_failed_rewards: float, max_failed_critiques: float, warn: Callable[[str], None]) -> None:
        self.max_failed_rewards = max_failed_rewards
        self.max_failed_critiques = max_failed_critiques
        self.warn = warn
        self.totals = Totals()
        self._traceback: str | None = None  # the step's first, of a reward or an environment
        self._critique: str | None = None  # the step's first
        self._told: set[str] = set()  # kinds of failures, in the whole run
        self._reasons: set[str] = set()  # of the step's failed rewards

    def new_step(self) -> None:
        self.totals, self._critique, self._traceback, self._reasons = Totals(), None, None, set()

    def count_episodes(self, reports: list[RolloutReport], seconds: float) -> None:
        self.totals.add("rollout/environment_failures", sum(r.environment_failures for r in reports), 1)
        self.totals.add("rollout/environment_seconds", seconds, 1)
        for report in reports:
            self._traceback = self._traceback or report.first_failure
            for kind, text in report.kinds.items():
                self._tell(
                    f"environment {kind}", f"an environment failed; its episodes are masked and counted:\n{text}"
                )

    def count_rewards(self, report: ScoreReport) -> None:
        before = self.totals.weights.get("reward/failed_share", 0.0)
        self.totals.add("reward/failed_share", sum(report.failed.values()), report.samples)
        for reason in sorted(set(report.failed) - self._reasons):
            self.totals.add(f"reward/failed/{reason}", 0, before)
        self._reasons |= set(report.failed)
        for reason in sorted(self._reasons):
            self.totals.add(f"reward/failed/{reason}", report.failed[reason], report.samples)
        self.totals.add("reward/no_opinion_share", report.no_opinion, report.samples)
        if len(report.component_sums) > 1:
            for name, total in report.component_sums.items():
                self.totals.add(f"reward/{name}", total, report.component_counts[name])
        self._traceback = self._traceback or report.first_traceback
        for kind, text in report.kinds.items():
            self._tell(f"reward {kind}", f"a reward failed; its samples are masked and counted:\n{text}")

    def count_critiques(self, report: JudgeReport) -> None:
        self.totals.merge(report.totals())
        self._critique = self._critique or report.first_failure
        for kind, text in report.kinds.items():
            self._tell(f"judge {kind}", f"judge: {text}")
        if report.cache_problem is not None:
            self._tell(f"judge {report.cache_problem.partition(':')[0]}", f"judge: {report.cache_problem}")

    def check(self) -> None:
        """Stop rather than train on what is left, or without critiques, when too much of a step failed."""
        means = self.totals.means()
        critiques, rewards = means.get("judge/failed_share", 0.0), means["reward/failed_share"]
        if critiques > self.max_failed_critiques:
            raise RewardError(
                f"judge: {critiques:.0%} of this step's critiques failed, expected at most {self.max_failed_critiques:.0%} "
                f"(judge.max_failed_share); the first: {self._critique}"
            )
        if rewards > self.max_failed_rewards:
            raise RewardError(
                f"reward: {rewards:.0%} of this step's samples failed, expected at most {self.max_failed_rewards:.0%} "
                f"(reward.max_failed_share); the first failure:\n{self._traceback}"
            )

    def check_groups(self, groups: int, rewarded: float) -> None:
        """Stop, and say why, when no group of the step is left to train on; `rewarded` of its samples had a reward."""
        if groups or self.nothing_to_learn(rewarded):
            return
        if rewarded:
            raise RewardError(
                "selection: no group of this step is left to train on, expected at least one; rewards may all be equal: "
                "look at samples.jsonl, or change the task's difficulty or algorithm.selection"
            )
        shares = self.totals.means()
        raise RewardError(
            f"reward: no sample of this step has a reward ({shares['reward/no_opinion_share']:.0%} no opinion, "
            f"{shares['reward/failed_share']:.0%} failed), expected some; let reward.functions return a number, or leave "
            "rows out that they say None to" + (f"; the first failure:\n{self._traceback}" if self._traceback else "")
        )

    def nothing_to_learn(self, rewarded: float) -> bool:
        """Whether a reward service was away, no sample has a reward, and the run is to go on all the same."""
        return not rewarded and "away" in self._reasons and self.max_failed_rewards >= 1

    def _tell(self, kind: str, line: str) -> None:
        """Say each kind of failure once in the run, up to `MOST_KINDS` of them."""
        if kind in self._told or len(self._told) > MOST_KINDS:
            return
        self._told.add(kind)
        if len(self._told) > MOST_KINDS:
            line = f"more than {MOST_KINDS} kinds of failures; further kinds are counted in the metrics and not shown"
        self.warn(line)
