"""The check of the whole stack on a GPU: what it reports of runs, and how it ends what fails or is late. Nothing is started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import gpu_check
from benchmarks.gpu import apart, runs
from benchmarks.gpu.apart import Ended
from benchmarks.gpu.report import Outcome, Part, run_here

ROOT = Path(__file__).parent.parent
STEP = {"timing/step": 2.0, "timing/sync": 0.5, "sync/sent_bytes": 1e9, "sync/proved_bytes": 1e9, "sync/gap": 0.001}


def values(outcome: Outcome) -> dict[str, float | str]:
    return {figure.name: figure.value for figure in outcome.figures}


def test_without_a_gpu_one_line_says_what_to_run_instead(monkeypatch, capsys):
    monkeypatch.setattr(apart, "gpu_is_there", lambda: False)
    assert gpu_check.main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "sees no GPU" in line and "make gpu-check" in line and "--cpu" in line


def test_parts_run_in_order_and_a_failure_stops_none(monkeypatch, tmp_path, capsys):
    ran = []

    def fake(module, part, device):
        ran.append((module, part.name, device))
        return Outcome(part.name, part.what, "failed" if part.name == "update" else "ok", "late")

    monkeypatch.setattr(apart, "run_part_apart", fake)
    monkeypatch.setattr(apart, "machine_of", lambda device: {"device": "H100", "driver": None})
    monkeypatch.setattr(apart, "gpu_is_there", lambda: True)
    out = tmp_path / "check.json"
    assert gpu_check.main(["update", "sync", "--out", str(out)]) == 1
    # The model that these parts take is made first.
    assert [name for _, name, _ in ran] == ["model", "update", "sync"]
    assert {(module, device) for module, _, device in ran} == {("benchmarks.gpu_check", "cuda")}
    written = json.loads(out.read_text())
    assert (written["tool"], written["machine"]["device"]) == ("gpu_check", "H100")
    assert [part["status"] for part in written["parts"]] == ["ok", "failed", "ok"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "device H100" and lines[-1] == "2 ok, 1 failed (update), 0 skipped"


def test_a_check_that_is_ended_ends_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    code = (
        "from benchmarks.gpu.apart import end_children_when_ended, run_command\n"
        "end_children_when_ended()\n"
        f"run_command(['sh', '-c', 'echo $$ > {pid}; exec sleep 60'], 60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (pid.is_file() and pid.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_run_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(runs, "run_command", lambda *_: Ended(1, "step 0\nConfigError: model.path: got x\nbye\n"))
    outcome = run_here(runs.QUICKSTART, "cpu")
    assert "apportion train ended with exit status 1: ConfigError: model.path: got x" in outcome.reason
    monkeypatch.setattr(runs, "run_command", lambda *_: Ended(None, "waiting\n"))
    assert "did not end within 220 s: waiting" in run_here(runs.QUICKSTART, "cpu").reason


def test_a_run_is_read_from_its_folder(monkeypatch):
    def fake(command, limit):
        folder = next(Path(word.partition("=")[2]) for word in command if word.startswith("runs_folder=")) / "run"
        folder.mkdir()
        steps = [{"eval/accuracy": 0.0}, {"step": 1, **STEP}]
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps))
        (folder / "summary.json").write_text('{"steps": 1}')
        return Ended(0, "")

    monkeypatch.setattr(runs, "run_command", fake)
    assert runs.train(10) == ([{"step": 1, **STEP}], {"steps": 1})


def test_a_sync_that_proves_less_than_it_sent_is_failed(monkeypatch):
    steps = [{"step": 1, **STEP, "timing/sync": 9.0}, {"step": 2, **STEP, "gpu/policy_gib": 31.5}]
    summary = {"peak_device_memory_mib": {"policy-0": 2048.0}}
    monkeypatch.setattr(runs, "train", lambda *_: (steps, summary))
    outcome = run_here(runs.SYNC, "cpu")
    assert outcome.status == "ok", outcome.reason
    found = values(outcome)
    assert found["sent bytes over timing/sync"] == 2.0  # the first step warms up
    assert found["gpu/policy_gib"] == 31.5
    assert found["summary: peak on the GPU, policy-0"] == 2.0
    steps[1]["sync/proved_bytes"] = 1e9 - 8
    assert run_here(runs.SYNC, "cpu").reason == "beyond its bound: step 2: bytes sent and not proved"


def test_steps_that_are_missing_fail_the_quickstart(monkeypatch):
    monkeypatch.setattr(runs, "train", lambda *_: ([STEP], {}))
    assert run_here(runs.QUICKSTART, "cpu").reason == "beyond its bound: steps that are missing"


def test_a_family_that_is_not_proved_is_failed_by_name(monkeypatch):
    table = "| family | tensors | |\n|---|---|---|\n| llama | 21 | {} |\n"
    monkeypatch.setattr(runs, "run_command", lambda *_: Ended(0, table.format("proved")))
    assert run_here(runs.FAMILIES, "cpu").status == "ok"
    monkeypatch.setattr(runs, "run_command", lambda *_: Ended(1, table.format("not proved: no engine")))
    outcome = run_here(runs.FAMILIES, "cpu")
    assert outcome.status == "failed" and values(outcome)["llama"] == "not proved: no engine"


def test_doctor_shows_what_is_wrong_and_the_gpus(monkeypatch):
    text = "ok    disk     free\nok    GPUs     one H100\nfail  memory   1 GiB\n\nnot ready: 1 to fix\n"
    monkeypatch.setattr(runs, "run_command", lambda *_: Ended(1, text))
    outcome = run_here(runs.DOCTOR, "cpu")
    assert outcome.reason == "beyond its bound: exit status"
    assert [figure.value for figure in outcome.figures] == [
        "GPUs one H100", "memory 1 GiB", "not ready: 1 to fix", 1,
    ]  # fmt: skip


def test_parts_are_skipped_where_the_model_could_not_be_made(monkeypatch, tmp_path):
    monkeypatch.setenv(runs.MODEL, str(tmp_path))
    outcome = run_here(Part("sync", "", runs.run_sync), "cuda")
    assert (outcome.status, outcome.reason) == ("skipped", "there is no model: the part `model` made none")


def test_every_part_has_a_limit_and_they_are_all_listed():
    parts = gpu_check.all_parts()
    assert [part.name for part in parts] == list(gpu_check.PARTS)
    assert all(0 < part.limit_seconds <= 420 for part in parts)
