"""Run a command as a process of its own with a time limit, and end all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import FAILED, Outcome, Part, as_json, exit_status, read_outcome, run_here, show, summary

ROOT = Path(__file__).resolve().parents[2]
TAIL_CHARACTERS = 20_000
END_SECONDS = 20.0  # that a command has to end itself after SIGTERM
END_PART_SECONDS = 45.0  # that a part has to end the commands it runs


def end_children_when_ended() -> None:
    """Let SIGTERM unwind this process, so that `run_command` ends what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@dataclass
class Ended:
    """How a command ended. `status` is None where it was late."""

    status: int | None
    output: str  # the end of stdout and stderr together

    @property
    def last_line(self) -> str:
        """The line that most likely names the error."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")


def run_command(command: Sequence[str], limit_seconds: float, end_seconds: float = END_SECONDS) -> Ended:
    """Run `command` from the repository's root, in a process group that is ended with it."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(command), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        status = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit_seconds)
        finally:
            _end_group(process, end_seconds)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - TAIL_CHARACTERS))
        return Ended(status, output.read().decode(errors="replace"))


def _end_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def run_part_apart(module: str, part: Part, device: str) -> Outcome:
    """Run one part as `python -m MODULE --one PART`, which writes its outcome to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", module, "--device", device, "--one", part.name, "--out", str(path)]
        ended = run_command(command, part.limit_seconds, END_PART_SECONDS)
        outcome = read_outcome(path) or Outcome(part.name, part.what, FAILED)
    if ended.status is None:
        outcome.status, outcome.reason = FAILED, f"no end within {part.limit_seconds:g} s"
        outcome.seconds = part.limit_seconds
    elif ended.status != 0:
        outcome.status, outcome.reason = FAILED, f"exit status {ended.status}: {ended.last_line}"
    return outcome


def gpu_is_there() -> bool:
    """Asked in another process: this one must hold no device memory."""
    return _printed("import torch; print(int(torch.cuda.is_available()))") == "1"


def machine_of(device: str) -> dict[str, Any]:
    """`device.describe`, in another process."""
    code = f"import json; from benchmarks.gpu.device import describe; print(json.dumps(describe({device!r})))"
    return json.loads(_printed(code))


def _printed(code: str) -> str:
    ended = run_command([sys.executable, "-c", code], 120)
    if ended.status != 0:
        raise RuntimeError(f"torch could not be asked what this machine has: {ended.last_line}")
    return ended.output.strip().splitlines()[-1]


def run_all(module: str, parts: list[Part], device: str, out: Path | None, apart: bool = True) -> int:
    """Run the parts, print each as it ends, write all that ended to `out` as JSON. Returns the exit status."""
    machine = machine_of(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None), flush=True)
    outcomes: list[Outcome] = []
    for part in parts:
        outcomes.append(run_part_apart(module, part, device) if apart else run_here(part, device))
        print(show(outcomes[-1]), flush=True)
        if out is not None:  # after each: a machine may be taken away
            out.write_text(json.dumps(as_json(module.rpartition(".")[2], machine, outcomes), indent=1) + "\n")
    print(summary(outcomes))
    return exit_status(outcomes)
