"""The numbers of a step: what every rank and worker reported, as one row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from apportion.actors.judge import COUNTED
from apportion.actors.policy import UpdateReport
from apportion.batch import Totals
from apportion.loop.state import PromptSource

_SUMS = (
    "rollout/trajectories", "rollout/prompts", "rollout/groups_dropped", "rollout/environment_failures",
    "rollout/environment_seconds",
)  # fmt: skip


@dataclass
class StepReports:
    """What a step's ranks and workers said."""

    rollout: Totals  # of trajectories, rewards and critiques
    credit: dict[str, float]
    trajectories: int  # that took part in the update
    seconds_sampling: float
    sampled_tokens: int  # in `timing/rollout`
    policy: list[UpdateReport]
    critic: list[UpdateReport] = field(default_factory=list)

    @property
    def update_tokens(self) -> int:
        return sum(report.tokens for report in self.policy or self.critic)


def step_metrics(reports: StepReports) -> dict[str, float]:
    """Means over the whole step, and what is counted as its sum."""
    totals = reports.rollout
    metrics = {**reports.credit, **update_metrics(reports.policy, "policy"), **update_metrics(reports.critic, "critic")}
    metrics |= totals.means()
    metrics["reward/std"] = math.sqrt(max(0.0, metrics.pop("reward/square") - metrics["reward/mean"] ** 2))
    metrics |= {name: total for name, total in totals.sums.items() if name.startswith(COUNTED)}
    return metrics | {name: totals.sums[name] for name in _SUMS if name in totals.sums}


def update_metrics(reports: list[UpdateReport], role: str) -> dict[str, float]:
    """Of the ranks of one role (policy or critic) in one step."""
    if not reports:
        return {}
    totals = Totals()
    for report in reports:
        totals.merge(report.totals)
    steps = reports[0].steps
    metrics = totals.means()
    # Without a row that teaches, no pass counts, and the loss is 0.
    metrics[f"{role}/loss"] = totals.sums.get(f"{role}/loss", 0.0) / len(steps)
    norms = [s.grad_norm for s in steps if s.grad_norm is not None]
    if norms:
        metrics[f"{role}/grad_norm"] = sum(norms) / len(norms)
    if role == "policy":
        metrics["policy/learning_rate"] = steps[-1].learning_rate
        metrics["policy/optimizer_steps"] = len(steps)
    return metrics


def data_metrics(prompts: PromptSource) -> dict[str, float]:
    """Training rows left out since the run began, by reason, and rows shown without earlier reasoning, as they are drawn.

    >>> from types import SimpleNamespace
    >>> data_metrics(SimpleNamespace(skipped={"too_long": 2, "empty": 1}, reasoning_left_out=4))
    {'data/skipped': 3.0, 'data/reasoning_left_out': 4.0, 'data/skipped/too_long': 2.0, 'data/skipped/empty': 1.0}
    """
    skipped = prompts.skipped
    whole = {"data/skipped": float(sum(skipped.values()))}
    if prompts.reasoning_left_out:
        whole["data/reasoning_left_out"] = float(prompts.reasoning_left_out)
    return whole | {f"data/skipped/{reason}": float(count) for reason, count in skipped.items()}


def speed_metrics(reports: StepReports, timing: dict[str, float]) -> dict[str, float]:
    """Seconds of each stage, and rates; `timing` has the whole `step` beside its stages."""
    step = timing["step"]
    stages = sum(seconds for stage, seconds in timing.items() if stage != "step")
    # Policy and critic update side by side: the slowest rank's seconds are those of all.
    updating = max((r.seconds for r in [*reports.policy, *reports.critic]), default=0.0)
    computing = reports.seconds_sampling + timing.get("signals", 0.0) + updating
    return {f"timing/{stage}": seconds for stage, seconds in timing.items()} | {
        "timing/other": step - stages,
        "perf/samples_per_second": reports.trajectories / step,
        "perf/rollout_tokens_per_second": reports.sampled_tokens / timing["rollout"],
        "perf/update_tokens_per_second": reports.update_tokens / timing["update"],
        "perf/overhead_share": max(0.0, 1 - computing / step),
    }
