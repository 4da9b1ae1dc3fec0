"""Whole runs for `benchmarks.gpu_check`: what each part starts, reads and reports."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.apart import ROOT, run_command
from benchmarks.gpu.device import GIB
from benchmarks.gpu.estimate import training_bytes
from benchmarks.gpu.models import save_model
from benchmarks.gpu.report import Part, Record, Skipped

MODEL = "GPU_CHECK_MODEL"  # environment variable: the folder of the random 1.5 B model
SHAPE = "1.5B"
SHARED = ("cluster.gpus_per_policy_rank=0.5", "cluster.gpus_per_rollout_engine=0.5")
# Nothing that a few steps do not need.
SHORT = ("evaluation.before=false", "evaluation.after=false", "checkpoint.final=false", "tracking.plots=false")
# Rewards that differ within each group, so that each row has a gradient.
REWARD = f"reward.functions={ROOT / 'benchmarks' / 'peer_reward.py'}:vowels"


def model_path(record: Record) -> str:
    """The model that most parts take. `Skipped` where it could not be made."""
    if not record.on_gpu:
        return "builtin:tiny"
    folder = Path(os.environ[MODEL])
    if not (folder / "config.json").is_file():
        raise Skipped("there is no model: the part `model` made none")
    return str(folder)


def run_model(record: Record) -> None:
    if not record.on_gpu:
        raise Skipped("without a GPU, builtin:tiny takes its place")
    save_model(SHAPE, Path(os.environ[MODEL]), "cuda")
    size = sum(file.stat().st_size for file in Path(os.environ[MODEL]).glob("*.safetensors"))
    record.say("written", size / GIB, "GiB")


def run_doctor(record: Record) -> None:
    ended = run_command([sys.executable, "-P", "-m", "apportion", "doctor"], 100)
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    for line in lines:
        mark, _, rest = line.partition(" ")
        if "GPU" in rest or mark in ("fail", "warn", "note"):
            record.say(mark, " ".join(rest.split()))
    record.say("last line", lines[-1] if lines else "no output")
    record.hold("exit status", -1 if ended.status is None else abs(ended.status), 0)


def train(limit_seconds: float, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics of each step and the summary of one run; RuntimeError where it does not end well."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "apportion", "train", f"runs_folder={folder}", *SHORT, *overrides]
        ended = run_command(command, limit_seconds)
        if ended.status is None:
            raise RuntimeError(f"apportion train did not end within {limit_seconds:g} s: {ended.last_line}")
        if ended.status:
            raise RuntimeError(f"apportion train ended with exit status {ended.status}: {ended.last_line}")
        [run] = Path(folder).iterdir()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [m for m in lines if "timing/step" in m], json.loads((run / "summary.json").read_text())


def median(steps: list[dict[str, Any]], name: str) -> float | None:
    """Over the steps after the first, which warms up; None where no step has the metric."""
    values = [step[name] for step in steps[1:] or steps if name in step]
    return statistics.median(values) if values else None


def say_device_memory(record: Record, steps: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Peaks on the GPU by role, as the run reports them."""
    for name in sorted({name for step in steps for name in step if name.startswith("gpu/")}):
        record.say(name, max(step[name] for step in steps if name in step), "GiB")
    for name, mib in sorted(summary.get("peak_device_memory_mib", {}).items()):
        record.say(f"summary: peak on the GPU, {name}", mib / 1024, "GiB")


def run_quickstart(record: Record) -> None:
    if record.on_gpu:
        steps, summary = train(220, "experiment=quickstart", "train.steps=5", *SHARED)
    else:
        steps, summary = train(220, "experiment=tiny_grpo", "train.steps=2")
    wanted = 5 if record.on_gpu else 2
    record.hold("steps that are missing", wanted - len(steps), 0)
    for name, unit in (("timing/step", "s"), ("perf/samples_per_second", ""), ("perf/overhead_share", "")):
        record.say(name, median(steps, name) or "absent", unit)
    say_device_memory(record, steps, summary)


def run_sync(record: Record) -> None:
    model = model_path(record)
    size = ["rollout.max_response_tokens=128", "train.prompts_per_step=16", "rollout.responses_per_prompt=8"]
    overrides = ["experiment=tiny_grpo", f"model.path={model}", "train.steps=3", REWARD]
    if record.on_gpu:
        overrides += [*size, *SHARED, "rollout.max_sequences=256", "policy.gradient_checkpointing=true"]
    steps, summary = train(280, *overrides)
    for step in steps:
        record.hold(f"step {step['step']}: bytes sent and not proved", _unproved(step), 0, "bytes")
    sent, seconds = steps[-1]["sync/sent_bytes"], median(steps, "timing/sync")
    record.say("sent and proved", sent / GIB, "GiB")
    record.say("timing/sync", seconds or "absent", "s")
    if seconds:
        record.say("sent bytes over timing/sync", sent / seconds / 1e9, "GB/s")
    for name in ("sync/gap", "timing/rollout", "timing/update", "timing/step"):
        value = median(steps, name)
        record.say(name, "absent" if value is None else value, "nats" if name == "sync/gap" else "s")
    say_device_memory(record, steps, summary)
    if record.on_gpu:
        estimated = training_bytes(SHAPE, 2048, 4096, True)
        record.say("the plan's estimate of the policy", sum(estimated.values()) / GIB, "GiB")


def _unproved(step: dict[str, Any]) -> float:
    return step["sync/sent_bytes"] - step["sync/proved_bytes"]


def run_families(record: Record) -> None:
    names = ("llama", "qwen3", "qwen3_moe") if record.on_gpu else ("llama",)
    ended = run_command([sys.executable, "-m", "benchmarks.families", *names], 280)
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in ended.output.splitlines() if "|" in line]
    found = {row[0]: row[-1] for row in rows}
    for name in names:
        record.say(name, found.get(name, "no result"))
    record.hold("families that are not proved", sum(found.get(name) != "proved" for name in names), 0)


DOCTOR = Part("doctor", "apportion doctor", run_doctor)
QUICKSTART = Part("quickstart", "the quickstart's recipe, a few steps", run_quickstart, 240)
MAKE = Part("model", "a 1.5 B model of random weights", run_model)
SYNC = Part("sync", "three steps with that model: syncs and memory", run_sync, 300)
FAMILIES = Part("families", "model families through a weight sync", run_families, 300)
