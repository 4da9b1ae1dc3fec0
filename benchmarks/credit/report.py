"""Tables, sentences and plots of the study's page, all made from the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.credit.protocol import Interval, Results

ROOT = Path(__file__).resolve().parents[2]
PAGE, PLOTS = ROOT / "docs" / "credit-study.md", ROOT / "docs" / "credit-study"
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e", "#a463f2", "#97bbf5", "#9498a0")


@dataclass
class Comparison:
    """A difference of two arms, seed by seed, and which sign the paper's claim gives it."""

    text: str
    differences: np.ndarray  # [seeds]
    claimed: int = 1  # +1, -1

    @property
    def interval(self) -> Interval:
        return Interval.of(self.differences)

    @property
    def verdict(self) -> str:
        found = self.interval
        low, high = (found.low, found.high) if self.claimed > 0 else (-found.high, -found.low)
        if low > 0:
            return "holds"
        return "the opposite holds" if high < 0 else "not told apart"

    def row(self) -> list[str]:
        agree = int((self.differences * self.claimed > 0).sum())
        return [self.text, self.interval.shown(sign=True), f"{agree} of {len(self.differences)}", self.verdict]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arms_table(results: Results, metrics: Sequence[str], places: int = 1, course: str | None = None) -> str:
    """Each arm at the end of its course; `course` names a metric whose mean over the course is added."""
    rows = []
    for arm in results.arms:
        row = [arm, *(Interval.of(results.last(arm, m, places)).shown() for m in metrics)]
        rows.append(row + ([Interval.of(results.course(arm, course)).shown()] if course else []))
    return table(["arm", *metrics, *([f"{course}, mean of the course"] if course else [])], rows)


def comparisons_table(comparisons: Sequence[Comparison]) -> str:
    columns = ["paired difference", "mean (95 % interval)", "seeds that agree", "claim"]
    return table(columns, [comparison.row() for comparison in comparisons])


def plot(results: Results, metrics: Sequence[str], across: str, arms: Sequence[str] | None = None) -> str:
    """A panel a metric: mean over seeds with its 95 % interval. Returns the picture's line for the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(metrics), figsize=(4.6 * len(metrics), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for arm, colour in zip(arms or results.arms, COLOURS, strict=False):
            draw(axis, results.places(arm), results.curves(arm, metric), arm, colour)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel(across, fontsize=9)
    axes[0][0].legend(fontsize=7, framealpha=0.8)
    return saved(figure, results.name, f"{', '.join(metrics)} of each arm over {across}")


def draw(axis: Any, places: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """Mean over seeds of values [seeds, places] with its interval."""
    bands = [Interval.of(column) for column in values.T]
    axis.plot(places, values.mean(0), color=colour, label=label, linewidth=1.6)
    axis.fill_between(places, [b.low for b in bands], [b.high for b in bands], color=colour, alpha=0.13)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)


def saved(figure: Any, name: str, description: str) -> str:
    import matplotlib.pyplot as plt

    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.png", dpi=110)
    plt.close(figure)
    return f"![{description}](credit-study/{name}.png)"
