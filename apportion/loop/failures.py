"""What failed in a step's data: counted, said once, and too much where it passes the run's limits."""

from __future__ import annotations

from collections.abc import Callable

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
        self._told = False
        self._told_of_judge: set[str] = set()

    def new_step(self) -> None:
        self.totals, self._critique, self._traceback = Totals(), None, None

    def count_episodes(self, reports: list[RolloutReport], seconds: float) -> None:
        self.totals.add("rollout/environment_failures", sum(r.environment_failures for r in reports), 1)
        self.totals.add("rollout/environment_seconds", seconds, 1)
        self._tell(
            "an environment failed; its episodes are", next((r.first_failure for r in reports if r.first_failure), None)
        )

    def count_rewards(self, report: ScoreReport) -> None:
        self.totals.add("reward/failed_share", sum(report.failed.values()), report.samples)
        self.totals.add("reward/no_opinion_share", report.no_opinion, report.samples)
        if len(report.component_sums) > 1:
            for name, total in report.component_sums.items():
                self.totals.add(f"reward/{name}", total, report.component_counts[name])
        self._tell("a reward failed; its samples are", report.first_traceback)

    def count_critiques(self, report: JudgeReport) -> None:
        self.totals.merge(report.totals())
        self._critique = self._critique or report.first_failure
        for problem in (report.first_failure, report.cache_problem):
            kind = "" if problem is None else problem.partition(":")[0]
            if problem is not None and kind not in self._told_of_judge:
                self._told_of_judge.add(kind)
                self.warn(f"judge: {problem}")

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
        if groups:
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
            "rows out that they say None to"
        )

    def _tell(self, what: str, traceback: str | None) -> None:
        self._traceback = self._traceback or traceback
        if traceback and not self._told:
            self._told = True
            self.warn(f"{what} masked and counted:\n{traceback}")
