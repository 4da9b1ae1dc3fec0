"""Scores trajectories: a thin actor around `scoring.Scorer`. Many may run side by side; they hold no state."""

from __future__ import annotations

from typing import Any

from apportion.actors.scoring import Scorer, ScoreReport
from apportion.batch import Batch, Prompt
from apportion.platform.process import ActorBase


class RewardWorker(ActorBase):
    def __init__(
        self, entries: Any, timeout_seconds: float, clip: float | None, tokenizer: str, step_delimiter: str
    ) -> None:
        self._scorer = Scorer(entries, timeout_seconds, clip, tokenizer, step_delimiter)

    def score(self, batch: Batch, prompts: list[Prompt]) -> tuple[ScoreReport, Batch]:
        scored, report = self._scorer.score(batch, prompts)
        return report, scored
