"""Scores trajectories: a thin actor around `scoring.Scorer`. Many may run side by side; they hold no state."""

from __future__ import annotations

from typing import Any

from apportion.actors.scoring import Scorer, ScoreReport
from apportion.batch import Batch, Prompt
from apportion.platform.process import ActorBase


class RewardWorker(ActorBase):
    def __init__(self, entries: Any, timeout_seconds: float, clip: float | None, tokenizer: str) -> None:
        reads_tokens = "model:" in repr(entries)  # only a reward model compares tokenizers
        self._scorer = Scorer(entries, timeout_seconds, clip, _tokenizer(tokenizer) if reads_tokens else None)

    def score(self, batch: Batch, prompts: list[Prompt]) -> tuple[ScoreReport, Batch]:
        scored, report = self._scorer.score(batch, prompts)
        return report, scored


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
