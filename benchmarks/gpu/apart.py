"""Run a command as a process of its own with a time limit, and end all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.report import FAILED, Outcome, Part, read_outcome

ROOT = Path(__file__).resolve().parents[2]
TAIL_CHARACTERS = 20_000
END_SECONDS = 20.0  # that a process has to end itself after SIGTERM


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


def run_command(command: Sequence[str], limit_seconds: float, environment: dict[str, str] | None = None) -> Ended:
    """Run `command` from the repository's root, in a process group that is ended with it."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(command), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        )  # fmt: skip
        status = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit_seconds)
        finally:
            _end_group(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - TAIL_CHARACTERS))
        return Ended(status, output.read().decode(errors="replace"))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def run_part_apart(module: str, part: Part, device: str) -> Outcome:
    """Run one part as `python -m MODULE --one PART`, which writes its outcome to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", module, "--device", device, "--one", part.name, "--out", str(path)]
        ended = run_command(command, part.limit_seconds)
        outcome = read_outcome(path) or Outcome(part.name, part.what, FAILED)
    if ended.status is None:
        outcome.status, outcome.reason = FAILED, f"no end within {part.limit_seconds:g} s"
        outcome.seconds = part.limit_seconds
    elif ended.status != 0:
        outcome.status, outcome.reason = FAILED, f"exit status {ended.status}: {ended.last_line}"
    return outcome
