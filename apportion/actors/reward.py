"""Scores trajectories: a thin actor around `scoring.Scorer`. Many may run side by side; they hold no state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from apportion.actors.reward_guard import GRACE_SECONDS, InterpreterGuard
from apportion.actors.reward_service import ServiceSource
from apportion.actors.reward_sources import FunctionSource
from apportion.actors.scoring import Scorer, ScoreReport
from apportion.batch import Batch, Prompt
from apportion.platform.process import ActorBase


class RewardWorker(ActorBase):
    def __init__(
        self,
        entries: Any,
        timeout_seconds: float,
        clip: float | None,
        tokenizer: Any,
        step_delimiter: str,
        outage_seconds: float = 0.0,
    ) -> None:
        self._scorer = Scorer(entries, timeout_seconds, clip, tokenizer, step_delimiter)
        for source in self._scorer.components.values():
            if isinstance(source, ServiceSource):
                source.wait_by_default(outage_seconds)
        users = [s for s in self._scorer.components.values() if isinstance(s, FunctionSource) and s.is_users]
        self._guard: AbstractContextManager[Any] = nullcontext()
        if users:
            longest = max(source.limit_seconds for source in users)
            self._guard = InterpreterGuard([source.name for source in users], longest + GRACE_SECONDS)

    def score(self, batch: Batch, prompts: list[Prompt]) -> tuple[ScoreReport, Batch]:
        with self._guard:
            scored, report = self._scorer.score(batch, prompts)
        return report, scored
