"""What a question's program gives back, how it is kept as JSON, and the intervals that are said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
# Quantiles 0.975 of Student's t for 1 to 30 degrees of freedom; beyond them the normal distribution's.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass
class Scale:
    """`most`: an upper bound of numbers of steps and prompts, for a trial; None for the study itself."""

    most: int | None = None

    def of(self, number: int) -> int:
        return number if self.most is None else min(number, self.most)


@dataclass
class Curve:
    """What was measured in the course of one run: places (steps, samples) and, for each name, one value a place."""

    places: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, place: float, measured: dict[str, float]) -> None:
        self.places.append(place)
        for name, value in measured.items():
            self.values.setdefault(name, []).append(round(float(value), 5))


@dataclass
class Outcome:
    """One seed of one question: every arm started from the same model and saw the same prompts."""

    curves: dict[str, Curve]


@dataclass
class Interval:
    """Mean of one number a seed and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float] | np.ndarray) -> Interval:
        """ValueError for less than two values.

        >>> Interval.of([1.0, 3.0]).mean
        2.0
        """
        numbers = np.asarray(values, np.float64)
        if len(numbers) < 2:
            raise ValueError(f"values: got {len(numbers)}, expected at least 2 seeds for an interval")
        mean, half = float(numbers.mean()), float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
        half *= T_975[len(numbers) - 2] if len(numbers) - 2 < len(T_975) else 1.96
        return Interval(mean, mean - half, mean + half)

    def shown(self, digits: int = 3, sign: bool = False) -> str:
        form = f"{{:{'+' if sign else ''}.{digits}f}}"
        return f"{form.format(self.mean)} ({form.format(self.low)} to {form.format(self.high)})"


class Results:
    """All seeds of one question."""

    def __init__(self, name: str, outcomes: dict[int, Outcome], seconds: float) -> None:
        self.name, self.outcomes, self.seconds = name, outcomes, seconds
        self.arms = list(next(iter(outcomes.values())).curves)

    @property
    def seeds(self) -> int:
        return len(self.outcomes)

    def curves(self, arm: str, metric: str) -> np.ndarray:
        """[seeds, places]"""
        return np.array([outcome.curves[arm].values[metric] for outcome in self.outcomes.values()])

    def places(self, arm: str) -> np.ndarray:
        return np.array(next(iter(self.outcomes.values())).curves[arm].places)

    def first(self, arm: str, metric: str) -> np.ndarray:
        """[seeds] before any step."""
        return self.curves(arm, metric)[:, 0]

    def last(self, arm: str, metric: str, places: int = 1) -> np.ndarray:
        """[seeds] mean over the last places."""
        return self.curves(arm, metric)[:, -places:].mean(-1)

    def course(self, arm: str, metric: str) -> np.ndarray:
        """[seeds] mean over the whole course, which is higher the sooner something is learned."""
        return self.curves(arm, metric)[:, 1:].mean(-1)

    def save(self) -> None:
        curves = {
            str(seed): {arm: {"places": c.places, "values": c.values} for arm, c in outcome.curves.items()}
            for seed, outcome in self.outcomes.items()
        }
        RESULTS.mkdir(exist_ok=True)
        data = {"question": self.name, "cpu_seconds": round(self.seconds), "seeds": curves}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(data, separators=(",", ":")) + "\n")

    @staticmethod
    def load(name: str) -> Results:
        data = json.loads((RESULTS / f"{name}.json").read_text())
        outcomes = {
            int(seed): Outcome({arm: Curve(c["places"], c["values"]) for arm, c in arms.items()})
            for seed, arms in data["seeds"].items()
        }
        return Results(name, outcomes, data["cpu_seconds"])
