"""The behavioral check of a sync: every engine and the trainer score one fixed text, and must agree.

Checksums show which tensors arrived. This check shows what an engine computes with them: it also finds a tensor that the
engine received and does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apportion.loop.state import Actors, Progress
from apportion.platform.cluster import Actor, gather
from apportion.platform.errors import WeightSyncError

TEXT = (
    "The capital of France is Paris. Water boils at 100 degrees Celsius, and 7 times 8 is 56. def add(a, b): return a + b. "
    "Rain falls on the hills, and the rivers carry it to the sea."
)
MOST_TOKENS = 64
SMALLEST_BOUND = 0.02  # nats
BASELINES = 5.0  # a gap may be this many times the baseline
LARGE_BASELINE = 0.1  # nats; above it engine and trainer disagree even about equal weights
FIRST_STEPS, EVERY_STEPS = 3, 10


def text_tokens(tokenizer: Any, most: int, vocabulary: int | None) -> np.ndarray:
    """The first tokens of `TEXT`, int32 [L]: at most `most`, and none that a model with `vocabulary` embeddings lacks.

    Plain text without a chat template, so that a base model has it too. A beginning-of-sequence token stays: some models
    compute nothing sensible without it.
    """
    ids = tokenizer(TEXT)["input_ids"]
    known = [token for token in ids if vocabulary is None or token < vocabulary]
    return np.asarray(known[: min(most, MOST_TOKENS)], np.int32)


def is_due(version: int) -> bool:
    """Whether the sync of this weights version is checked: the first one, those of steps 1 to 3, every tenth.

    >>> [version for version in range(31) if is_due(version)]
    [0, 1, 2, 3, 10, 20, 30]
    """
    return version <= FIRST_STEPS or version % EVERY_STEPS == 0


@dataclass
class SyncCheck:
    """Measures the gap: the mean over the text's tokens of |engine's log-prob - trainer's log-prob|, in nats, of the
    engine that differs most."""

    actors: Actors
    token_ids: np.ndarray  # [L] int32; fewer than 2: nothing to score, no check
    max_gap: float | None  # None: the larger of SMALLEST_BOUND and BASELINES times the baseline
    call_timeout_seconds: float
    warn: Callable[[str], None]
    metrics: dict[str, float] = field(default_factory=dict)  # measured since the last `taken`
    _started: bool = False  # a sync of this process was checked

    @classmethod
    def off(cls, actors: Actors) -> SyncCheck:
        """One that checks nothing."""
        return cls(actors, np.zeros(0, np.int32), None, 0.0, lambda message: None)

    @property
    def is_off(self) -> bool:
        return len(self.token_ids) < 2

    def measure_baseline(self, progress: Progress) -> None:
        """Fill in `progress.sync_baseline` unless it is known. Engines and ranks must hold the model's original files."""
        if self.is_off or progress.sync_baseline is not None:
            return
        engine, gap = self._largest_gap(progress, "before the first sync")
        progress.sync_baseline = self.metrics["sync/baseline"] = gap
        if gap > LARGE_BASELINE:
            self.warn(
                f"{engine}: before the first sync, engine and trainer hold the same weights, and the log-probs of a fixed text "
                f"differ by {gap:.4f} nats a token on average (more than {LARGE_BASELINE}): they compute different things, so "
                "the policy learns from samples of another one; try another model.attention, model.dtype=float32 or "
                "rollout.engine=transformers"
            )

    def after_sync(self, progress: Progress) -> None:
        """Check the first sync of this process, and those that are due. WeightSyncError for a gap beyond the bound."""
        if self.is_off or (self._started and not is_due(progress.policy_version)):
            return
        self._started = True
        when = f"after the sync of weights version {progress.policy_version}"
        engine, gap = self._largest_gap(progress, when)
        self.metrics["sync/gap"] = gap
        bound, reason = self._bound(progress)
        if gap > bound:
            raise WeightSyncError(
                f"{engine}: {when}, the log-probs of a fixed text differ from the trainer's by {gap:.4f} nats a token on "
                f"average, expected at most {bound:.4f} ({reason}): the engine does not compute with the trainer's weights, "
                "and would sample from another policy; if only the arithmetic differs, set model.dtype=float32, another "
                "model.attention, or train.max_sync_gap above this gap"
            )

    def taken(self) -> dict[str, float]:
        """What was measured since the last call, for a row of metrics."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def _bound(self, progress: Progress) -> tuple[float, str]:
        """The bound, and what it follows from."""
        baseline = progress.sync_baseline
        assert baseline is not None
        measured = f"{baseline:.4f} before the first sync"
        if self.max_gap is not None:
            return self.max_gap, f"train.max_sync_gap; {measured}"
        if BASELINES * baseline > SMALLEST_BOUND:
            return BASELINES * baseline, f"{BASELINES:g} times the {measured}"
        return SMALLEST_BOUND, f"the smallest bound; {measured}"

    def _largest_gap(self, progress: Progress, when: str) -> tuple[str, float]:
        """The engine that differs most from the trainer, and by how much."""
        trainer = self._scores(self.actors.policy, progress, when)[0]
        gaps = [
            (float(np.abs(scores - trainer).mean()), actor.name)
            for actor, scores in zip(
                self.actors.rollout, self._scores(self.actors.rollout, progress, when), strict=True
            )
        ]
        gap, engine = max(gaps)
        return engine, gap

    def _scores(self, actors: list[Actor], progress: Progress, when: str) -> list[np.ndarray]:
        """Log-probs float64 [L - 1] by each actor. WeightSyncError for one that is no finite number."""
        calls = [actor.call("score", self.token_ids) for actor in actors]
        answers = gather(calls, self.call_timeout_seconds, f"sync of step {progress.step + 1}")
        scores = [np.asarray(answer, np.float64) for answer in answers]
        for actor, score in zip(actors, scores, strict=True):
            odd = int((~np.isfinite(score)).sum())
            if odd:
                raise WeightSyncError(
                    f"{actor.name}: {when}, {odd} of {len(score)} log-probs of a fixed text are not finite, expected numbers: "
                    "its weights are not finite or its arithmetic overflows; resume from an earlier checkpoint, or set "
                    "model.dtype=bfloat16 or float32"
                )
        return scores
