"""Commands of whole runs: started in sessions of their own, marked, read, and ended.

Every run carries a mark in its environment, which all its processes inherit, so that what it leaves running can be found.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

APPORTION = str(Path(sys.executable).parent / "apportion")
MARK = "APPORTION_TEST_MARK"
COMMON = [
    "tracking.console=false",
    "tracking.plots=false",
    "data.eval=null",
    "evaluation.before=false",
    "cluster.threads=1",
]
QUICK = [*COMMON, "rollout.engine=transformers", "checkpoint.final=false"]


@dataclass
class Run:
    """A command under way in a session of its own, as a shell would start it."""

    words: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.output_file = self.folder / f"output-{self.mark}.txt"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with open(self.output_file, "wb") as output:
            self.process = subprocess.Popen(
                self.words, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True,
                env=kept | {MARK: self.mark} | self.environment,
            )  # fmt: skip

    def finished(self, seconds: float = 240) -> "Run":
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self.words[1:3]} took more than {seconds} s:\n{self.output}") from None
        return self

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def left_running(self, patience: float = 15) -> list[str]:
        """Command lines of this run's processes that are still there after a while."""
        deadline = time.monotonic() + patience
        while True:
            found = {pid: line for pid, line in marked(self.mark).items() if pid != self.process.pid}
            if not found or time.monotonic() > deadline:
                return list(found.values())
            time.sleep(0.2)

    def end(self) -> None:
        for pid in marked(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def marked(mark: str) -> dict[int, str]:
    """Living processes that carry `mark`: pid -> command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if f"{MARK}={mark}".encode() in environment.split(b"\0") and state != "Z":
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        except OSError:
            continue
    return found


def lines_of(run_folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    file = run_folder / name
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def steps_of(run_folder: Path) -> dict[int, dict]:
    return {line["step"]: line for line in lines_of(run_folder) if "policy/loss" in line}


def error_of(run: Run) -> str:
    """The one line that says what went wrong."""
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.output
    return errors[0]


@contextmanager
def starting(folder: Path) -> Iterator[Callable[..., Run]]:
    """Start runs in `folder`; whatever a test makes of them, they do not outlive this context."""
    runs: list[Run] = []

    def start(*words: str, program: str = APPORTION, **environment: str) -> Run:
        runs.append(Run([program, *words], folder, environment))
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            run.end()
