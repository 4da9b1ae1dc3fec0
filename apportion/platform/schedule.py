"""Learning rate as a pure function of the optimiser step, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math
from typing import Protocol


class ScheduleSettings(Protocol):
    learning_rate: float
    schedule: str
    warmup_steps: int
    min_lr_ratio: float


def learning_rate_at(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """The rate of optimiser step `step` (from 0) out of `total_steps`: linear warm-up, then constant, linear or cosine
    decay down to `min_lr_ratio` of the peak at the last step."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup - 1))
    shape = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape)
