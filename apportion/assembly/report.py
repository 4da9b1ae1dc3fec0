"""What a run says to the person who started it, and leaves in its summary."""

from __future__ import annotations

from typing import Any

from apportion.batch import Prompt
from apportion.conf.schema import Config
from apportion.loop.device_memory import DevicePeaks
from apportion.loop.state import Progress
from apportion.platform.messages import plain_text, say
from apportion.platform.runs import RunFolder


def summary_of(
    config: Config, progress: Progress, memory: dict[str, float], seconds: float, held_out: list[Prompt]
) -> dict[str, Any]:
    stages = progress.stage_seconds
    rollout, update = stages.get("rollout", 0.0), stages.get("update", 0.0)
    return {
        "accuracy_before": progress.accuracy_before,
        "accuracy_after": progress.accuracy_after,
        "steps": progress.step,
        "wall_seconds": progress.wall_seconds or seconds,
        "samples_per_second": _rate(progress.samples, progress.step_seconds),
        "rollout_tokens_per_second": _rate(progress.rollout_tokens, rollout),
        "update_tokens_per_second": _rate(progress.update_tokens, update),
        "seconds_per_stage": {k: v for k, v in stages.items() if k != "step"},
        "peak_memory_mib": memory,
        "answers_before": examples(progress.answers_before, held_out),
        "answers_after": examples(progress.answers_after, held_out),
        "last_metrics": progress.metrics,
        "seed": config.seed,
    }


def device_summary(peaks: DevicePeaks) -> dict[str, Any]:
    """What a summary has of GPUs, the time after the last step included; nothing where the run has none."""
    peaks.measure()
    return {"peak_device_memory_mib": peaks.mib} if peaks.mib else {}


def print_device_memory(summary: dict[str, Any]) -> None:
    if peaks := summary.get("peak_device_memory_mib"):
        most = ", ".join(f"{name} {mib / 1024:.1f} GiB" for name, mib in peaks.items())
        say(f"most GPU memory of each actor: {most}")


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def examples(answers: list[dict[str, Any]], held_out: list[Prompt]) -> list[dict[str, Any]]:
    asked = {p.prompt_id: _last_question(p.prompt) for p in held_out}
    return [{"prompt": asked[a["prompt_id"]], "answer": a["answer"], "reward": a["reward"]} for a in answers]


def _last_question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def print_report(summary: dict[str, Any], folder: RunFolder) -> None:
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    if before is not None and after is not None:
        say(f"\nheld-out greedy accuracy: {before:.3f} before, {after:.3f} after ({after - before:+.3f})")
    for old, new in zip(summary["answers_before"], summary["answers_after"], strict=False):
        say(f"\n{plain_text(old['prompt'])}")
        say(f"  before: {plain_text(old['answer'])!r} ({rewarded(old['reward'])})")
        say(f"  after:  {plain_text(new['answer'])!r} ({rewarded(new['reward'])})")
    print_device_memory(summary)
    say(
        f"\nrun folder: {folder.path} (summary.json, metrics.jsonl, samples.jsonl, tokens.html, plots, logs, checkpoints)"
    )


def rewarded(reward: float | None) -> str:
    """What is said of an answer's reward; None where it failed or no reward has an opinion."""
    return "no reward" if reward is None else f"reward {reward:g}"
