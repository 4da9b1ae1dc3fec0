"""Answers to all held-out prompts, scored: during training, after it, and of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apportion.actors.credit import EvaluationReport
from apportion.actors.engines import Sampling
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.batch import Prompt
from apportion.loop.calls import deal, with_refs
from apportion.loop.state import Actors
from apportion.platform.cluster import Call, gather
from apportion.platform.errors import RewardError


@dataclass
class EvaluationSettings:
    every_steps: int
    before: bool
    after: bool
    greedy: bool
    samples: int
    ks: list[int]
    temperature: float
    max_tokens: int
    correct_at: float
    show: int
    max_failed_share: float  # of the answers' rewards


@dataclass
class Evaluator:
    """Greedy answers, and sampled ones for avg@k and pass@k, by the weights that the engines hold.

    An answer whose reward failed, or that no reward has an opinion of, is neither right nor wrong: it is left out.
    """

    actors: Actors
    settings: EvaluationSettings
    prompts: list[Prompt]
    stop: list[str]
    call_timeout_seconds: float
    warn: Callable[[str], None]

    def evaluate(self, when: str) -> EvaluationReport:
        """`when` is for errors: "evaluation of step 3". What is not known is no metric, and None in an answer.

        RewardError, with the first traceback, where more than `max_failed_share` of the answers have a failed reward.
        """
        settings = self.settings
        greedy: list[Any] = []
        sampled: list[Any] = []
        reports: list[ScoreReport] = []
        if settings.greedy:
            greedy, reports = self._scored(Sampling(0.0, max_tokens=settings.max_tokens, stop=self.stop), 1, when)
        if settings.samples:
            sampling = Sampling(settings.temperature, max_tokens=settings.max_tokens, stop=self.stop)
            sampled, more = self._scored(sampling, settings.samples, when)
            reports = reports + more
        failed_share = self._failed_share(reports, when)
        arguments = (settings.correct_at, settings.ks, settings.show, len(greedy), *greedy, *sampled)
        [report] = self._gather([self.actors.credit.call("evaluate_refs", *arguments)], when)
        metrics = {name: value for name, value in report.metrics.items() if not math.isnan(value)}
        answers = [{**a, "reward": None if math.isnan(a["reward"]) else a["reward"]} for a in report.answers]
        return EvaluationReport(metrics | failed_share, answers)

    def _scored(self, sampling: Sampling, responses: int, when: str) -> tuple[list[Any], list[ScoreReport]]:
        """References to scored batches, one an engine, and what their scoring was."""
        chunks = deal(self.prompts, len(self.actors.rollout))
        calls, group = [], 0
        for actor, chunk in zip(self.actors.rollout, chunks, strict=False):
            calls.append(actor.call("generate", chunk, group, responses, Sampling(**vars(sampling)), returns=2))
            group += len(chunk)
        sampled: list[RolloutReport] = self._gather(calls, when)
        batches = [ref for _, ref in with_refs(sampled, calls)]
        workers = self.actors.reward
        scoring = [
            workers[i % len(workers)].call("score", batch, chunk, returns=2)
            for i, (batch, chunk) in enumerate(zip(batches, chunks, strict=True))
        ]
        reports: list[ScoreReport] = self._gather(scoring, when)
        for report, rollout in zip(reports, sampled, strict=True):
            # Scoring knows only that an environment failed; the engine that spoke to it knows why.
            report.first_traceback = rollout.first_failure or report.first_traceback
        return [ref for _, ref in with_refs(reports, scoring)], reports

    def _failed_share(self, reports: list[ScoreReport], when: str) -> dict[str, float]:
        """The metric; nothing where nothing is scored."""
        whole, most = ScoreReport.merge(reports), self.settings.max_failed_share
        if not whole.samples:
            return {}
        said = f"{when}: the rewards of {whole.failed_share:.0%} of the held-out answers failed"
        if whole.failed_share > most:
            raise RewardError(
                f"{said}, expected at most {most:.0%} (reward.max_failed_share); the first failure:\n"
                f"{whole.first_traceback}"
            )
        if whole.first_traceback:
            self.warn(f"{said}; those answers are left out and counted:\n{whole.first_traceback}")
        return {"eval/failed_share": whole.failed_share}

    def _gather(self, calls: list[Call], when: str) -> list[Any]:
        return gather(calls, self.call_timeout_seconds, when)
