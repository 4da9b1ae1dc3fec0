"""What of a step is neither sampling nor forward and backward passes, and each process's peak memory: a real short run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_report import Part, Row, Table, write_part

STEPS = 5
WARM_UP = 1
STAGES = ("rollout", "score", "cut", "signals", "credit", "update", "sync", "other")


def train(folder: str, *overrides: str) -> tuple[list[dict], dict]:
    """Metrics of each step after the warm-up, and the summary, of a run of the quickstart's recipe."""
    command = [
        sys.executable, "-P", "-m", "apportion", "train", "experiment=quickstart", f"runs_folder={folder}",
        "evaluation.before=false", "evaluation.after=false", "checkpoint.final=false", "tracking.plots=false",
        *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    [run] = Path(folder).iterdir()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after = [s for s in steps if s.get("step", 0) > WARM_UP and "timing/step" in s]
    return after, json.loads((run / "summary.json").read_text())


def main(out: str) -> int:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps, summary = train(folder, f"train.steps={STEPS}")
    share = statistics.median(s["perf/overhead_share"] for s in steps)
    total = statistics.median(s["timing/step"] for s in steps)
    rows = [
        Row(
            "share of a step that is neither sampling nor passes", share, "", 0.10, False,
            "Most of it is the sync: weights are copied, loaded and proved by checksums on both sides each step.",
            f"median of {len(steps)} steps",
        ),
        Row("seconds a step", total, "s"),
        Row("samples/s", statistics.median(s["perf/samples_per_second"] for s in steps), ""),
    ]  # fmt: skip
    memory = summary["peak_memory_mib"]
    tables = [
        Table("Where a step goes", ["stage", "median s", "share"], [_stage(name, steps) for name in STAGES]),
        Table("Peak memory", ["process", "MiB"], [[name, f"{mib:,.0f}"] for name, mib in sorted(memory.items())]),
    ]
    method = (
        f"`apportion train experiment=quickstart train.steps={STEPS}` without evaluation, the first step left out. The "
        "share is the run's own `perf/overhead_share`: 1 - (seconds in the rollout engine + seconds in the policy's "
        "passes and optimiser steps) / seconds of the step. Whole groups with equal rewards have no gradient and their "
        "passes are not made, which makes a step shorter and this share larger."
    )
    write_part(out, Part("step", "A whole step", method, rows, tables), started)
    return 0


def _stage(name: str, steps: list[dict]) -> list[str]:
    seconds = [s.get(f"timing/{name}", 0.0) for s in steps]
    shares = [v / s["timing/step"] for v, s in zip(seconds, steps, strict=True)]
    return [name, f"{statistics.median(seconds):.3f}", f"{statistics.median(shares):.3f}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
