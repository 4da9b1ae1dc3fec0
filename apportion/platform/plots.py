"""A run's curves as pictures, from its `metrics.jsonl` alone."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

from apportion.platform.errors import ApportionError
from apportion.platform.tracking import METRICS_FILE, read_metrics

# file -> (title, label of the y axis, metrics in one picture; those a run does not have are left out)
CURVES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "reward": ("Reward", "mean of sampled responses", ("reward/mean",)),
    "accuracy": ("Held-out accuracy", "share correct", ("eval/greedy_accuracy", "eval/avg_at_k")),
    "response_length": ("Response length", "tokens", ("rollout/response_tokens_mean", "rollout/response_tokens_max")),
    "kl": ("KL", "nats a token", ("policy/kl_reference", "policy/approx_kl", "mismatch/k3")),
    "tokens_per_second": ("Speed", "tokens/s", ("perf/rollout_tokens_per_second", "perf/update_tokens_per_second")),
    "loss": ("Loss", "loss", ("policy/loss", "critic/loss", "sft/loss", "reward_model/loss", "dpo/loss")),
    "pair_accuracy": (
        "Pairs",
        "share with a positive margin",
        ("dpo/accuracy", "reward_model/accuracy", "eval/pair_accuracy"),
    ),
    "pair_margin": ("Pairs", "margin", ("dpo/margin", "reward_model/margin", "eval/pair_margin")),
    "nll": ("Likelihood", "nats a token", ("sft/nll", "eval/nll")),
}


def plot_run(run_folder: str | Path) -> list[Path]:
    """Write `plots/NAME.png` for every curve that the run has at least one finite value of; the files, in that order.

    ApportionError where there is no `metrics.jsonl`.
    """
    folder = Path(run_folder)
    if not (folder / METRICS_FILE).is_file():
        raise ApportionError(
            f"{folder}: got no {METRICS_FILE}, expected a run's folder that was tracked with tracking.jsonl=true"
        )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # a first run would end with word of its font cache
    lines = read_metrics(folder)
    (folder / "plots").mkdir(exist_ok=True)
    return [file for name in CURVES if (file := _plot_curve(lines, name, folder / "plots" / f"{name}.png")) is not None]


def _plot_curve(lines: list[dict[str, Any]], name: str, file: Path) -> Path | None:
    # The object interface draws without a display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, label, metrics = CURVES[name]
    points = {metric: curve_points(lines, metric) for metric in metrics}
    drawn = {metric: pairs for metric, pairs in points.items() if pairs}
    if not drawn:
        return None
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for metric, pairs in drawn.items():
        axes.plot(*zip(*pairs, strict=True), marker="o", markersize=3, linewidth=1.5, label=metric)
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    partial = file.with_name(
        f".{file.name}.partial-{secrets.token_hex(3)}"
    )  # a link at `file` is replaced, not followed
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def curve_points(lines: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(step, value) wherever a line knows the metric; null (not finite) leaves a gap."""
    return [(line["step"], line[metric]) for line in lines if metric in line and line[metric] is not None]
