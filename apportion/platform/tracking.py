"""Where the numbers and samples of a run go: jsonl, TensorBoard, wandb, the console; several at once.

The metrics file belongs to the run and may stop it (a full disk). The others serve people: one that fails after the
start is given up with a warning, and the run goes on. Names are those of `metric_names`; pictures are made in `plots`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from apportion.platform.errors import ApportionError, ConfigError
from apportion.platform.files import write_text_atomically
from apportion.platform.foreign import open_to_append, parse_json, refuse_link
from apportion.platform.known_secrets import known, redacted_text, without_known
from apportion.platform.messages import plain_text, quoted, warn
from apportion.platform.metric_names import unknown_metrics
from apportion.platform.run_state import is_count, is_number

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
State = dict[str, Any]


class Tracker(Protocol):
    """One place that numbers go to. `vital`: the run must not go on without it."""

    name: str
    vital: bool

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one step; a step comes once, in rising order."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Whole trajectories to read; all rows of a step have the same keys."""

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """What `summary.json` holds, at the end."""

    def warn(self, message: str) -> None:
        """Something a person should know and the run survived."""

    def state(self) -> State:
        """What a resumed run needs to go on in the same place, as JSON values."""

    def close(self) -> None: ...


class JsonlTracker:
    """`metrics.jsonl`: a line a step with `step`, `time` (Unix seconds) and metrics. `samples.jsonl`: a line a sample.

    Every line is flushed. JSON has no NaN: a value that is not finite is null. Warnings stand in the next step's line
    under `warnings` (in the last one, when they came after it). On resume from `resume_step`, lines of later steps are
    dropped, and with them a last line torn by a kill, so that every step is there once: not before the run goes on,
    because a resume may still be refused.
    """

    name = "jsonl"
    vital = True

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self._folder = folder
        self._pending: list[str] = []
        self._last = -1 if resume_step is None else resume_step
        self._metrics: Any = None
        self._samples: Any = None
        for file in self._files():
            if resume_step is not None:
                _read_lines(file)  # a broken one is said now
            else:
                raise ConfigError(f"{file}: exists, expected a new run's folder: choose another run_name, or resume it")
        if resume_step is None:
            self._begin()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._last:
            raise ValueError(
                f"metrics: got step {step} after step {self._last}, expected each step once, in rising order"
            )
        self._begin()
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line.update({name: _finite(value) for name, value in metrics.items()})
        if self._pending:
            line["warnings"] = self._pending
        _write_line(self._metrics, line)
        self._pending, self._last = [], step

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._begin()
        for row in rows:
            _write_line(self._samples, {"step": step, **row})

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """No line: `summary.json` is the run folder's. A resumed run without a step left ends here, and begins."""
        self._begin()

    def warn(self, message: str) -> None:
        self._pending.append(message)

    def state(self) -> State:
        return {}

    def close(self) -> None:
        if self._metrics is None:
            return
        self._metrics.close()
        self._samples.close()
        lines = read_metrics(self._folder) if self._pending else []
        if lines:
            lines[-1]["warnings"] = [*lines[-1].pop("warnings", []), *self._pending]
            _write_lines(self._folder / METRICS_FILE, lines)
        self._pending = []

    def _files(self) -> list[Path]:
        return [file for name in (METRICS_FILE, SAMPLES_FILE) if (file := self._folder / name).exists()]

    def _begin(self) -> None:
        if self._metrics is not None:
            return
        for file in self._files():
            _drop_later_lines(file, self._last)
        self._metrics = open_to_append(self._folder / METRICS_FILE)  # open as long as the run
        self._samples = open_to_append(self._folder / SAMPLES_FILE)


class TensorBoardTracker:
    """Event files under `tensorboard/`. On resume, TensorBoard hides what was written of later steps."""

    name = "tensorboard"
    vital = False

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for index, row in enumerate(rows):
            # Four spaces make a block of Markdown code: a model's text is shown, not interpreted.
            text = "\n\n".join(f"**{key}**\n\n" + _indented(cell(value)) for key, value in row.items())
            # A lone surrogate (of a judge's answer, of a column) cannot be written as it stands.
            self._writer.add_text(f"samples/{index}", text.encode("utf-8", "backslashreplace").decode(), step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", _indented(json.dumps(summary, indent=2, default=plain)))

    def warn(self, message: str) -> None:
        """Nothing: warnings are for the console and the metrics file."""

    def state(self) -> State:
        return {}

    def close(self) -> None:
        self._writer.close()


class MultiTracker:
    """All of a run's trackers as one.

    Those that are not vital go first, so that the failure of one is in the metrics line of the same step. A failed one
    is closed and left out from then on; each failure is said once, on the console and in the metrics file (on stderr
    when there is neither). A metric name that the table does not have is said once, too.
    """

    name = "all"
    vital = True

    def __init__(self, trackers: Sequence[Tracker], states: State | None = None) -> None:
        self._trackers = sorted(trackers, key=lambda tracker: tracker.vital)
        self._failures = 0
        self._unknown: set[str] = set()
        self._states: State = dict(states or {})  # also of those that are off in this part of the run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if known.mask(names := "\n".join(metrics)) != names:  # a name may come from a user's function
            metrics = {known.mask(name): value for name, value in metrics.items()}
        unknown = [name for name in unknown_metrics(metrics) if name not in self._unknown]
        if unknown:
            self._unknown.update(unknown)
            self.warn(f"metrics without a line in docs/metrics.md: {', '.join(unknown)}")
        for tracker in list(self._trackers):
            seen = {**metrics, "tracking/failures": float(self._failures)} if self._failures else metrics
            self._attempt(tracker, "log", step, seen)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        rows = [without_known(row) for row in rows]
        for tracker in list(self._trackers):
            self._attempt(tracker, "log_samples", step, rows)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        summary = without_known(summary)
        for tracker in list(self._trackers):
            self._attempt(tracker, "log_summary", summary)

    def warn(self, message: str) -> None:
        """Tracebacks of a user's functions come here, with whatever addresses and keys stand in them."""
        message = redacted_text(message)
        if not any(tracker.name in ("console", "jsonl") for tracker in self._trackers):
            warn(plain_text(message))
        for tracker in list(self._trackers):
            self._attempt(tracker, "warn", message)

    def state(self) -> State:
        """`{tracker: its state}`; one that was given up keeps its last state, so that a resumed run tries it again."""
        return {**self._states, **{tracker.name: tracker.state() for tracker in self._trackers}}

    def close_console(self) -> None:
        """End the live table, so that what is printed next stays below it; the other trackers go on."""
        for tracker in self._trackers:
            if tracker.name == "console":
                tracker.close()

    def close(self) -> None:
        for tracker in list(self._trackers):
            self._attempt(tracker, "close")
        self._trackers = []

    def _attempt(self, tracker: Tracker, method: str, *arguments: Any) -> None:
        try:
            getattr(tracker, method)(*arguments)
        except Exception as error:
            if tracker.vital:
                raise
            self._give_up(tracker, method, error)

    def _give_up(self, tracker: Tracker, method: str, error: Exception) -> None:
        self._trackers = [other for other in self._trackers if other is not tracker]
        self._failures += 1
        self._states[tracker.name] = tracker.state()
        cause = f"{type(error).__name__}: {one_line(error)}"
        self.warn(f"tracking.{tracker.name} failed in {method} and is off from here ({cause})")
        if method == "close":
            return
        try:
            tracker.close()
        except Exception as second:  # noqa: BLE001 - it already failed; its close only frees what it can
            self.warn(
                f"tracking.{tracker.name} could not be closed either ({type(second).__name__}: {one_line(second)})"
            )


class TrackingSettings(Protocol):
    """What is read of the configuration's `tracking`."""

    console: bool
    jsonl: bool
    tensorboard: bool
    wandb: str
    wandb_project: str
    wandb_entity: str | None
    wandb_tags: list[str]


@dataclass
class TrackedRun:
    """The run that is tracked. `config` must be free of secrets; `resume_*` come from a checkpoint."""

    folder: Path
    name: str
    total_steps: int
    config: Mapping[str, Any]
    resume_step: int | None = None
    resume_state: State = field(default_factory=dict)


def open_trackers(settings: TrackingSettings, run: TrackedRun, console: Tracker | None = None) -> MultiTracker:
    """The trackers that `settings` asks for, `console` in place of the live table. One that cannot start is a
    ConfigError: better now than after hours."""
    from apportion.platform.console import ConsoleTracker
    from apportion.platform.wandb_tracking import WandbSettings, WandbTracker

    trackers: list[Tracker] = []
    if settings.wandb != "off":
        earlier = run.resume_state["wandb"].get("run_id") if "wandb" in run.resume_state else None
        if "wandb" in run.resume_state and not isinstance(earlier, str):
            raise ConfigError(
                f"resume: got {quoted(earlier)} as trackers.wandb.run_id in state.json, expected wandb's name of the run; "
                "take another checkpoint, or tracking.wandb=off"
            )
        wandb = WandbSettings(
            settings.wandb, settings.wandb_project, run.name, settings.wandb_entity, list(settings.wandb_tags), earlier
        )
        trackers.append(WandbTracker(run.folder, wandb, run.config))
    if settings.tensorboard:
        trackers.append(TensorBoardTracker(run.folder, run.resume_step))
    if settings.jsonl:
        trackers.append(JsonlTracker(run.folder, run.resume_step))
    if settings.console:
        trackers.append(console or ConsoleTracker(run.total_steps, start_step=run.resume_step or 0))
    return MultiTracker(trackers, run.resume_state)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, by step; a torn last line (a run that was killed) is left out."""
    return [line for line in _read_lines(folder / METRICS_FILE) if line is not None]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `samples.jsonl`, as `read_metrics`."""
    return [line for line in _read_lines(folder / SAMPLES_FILE) if line is not None]


def _read_lines(file: Path) -> list[dict[str, Any] | None]:
    """Parsed lines; None in place of a torn last one. A broken line before it is an error that names it."""
    refuse_link(file)
    lines = file.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    parsed: list[dict[str, Any] | None] = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(_line(line, file.name == METRICS_FILE))
        except ValueError as error:
            if number < len(lines) or not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                raise ApportionError(
                    f"{file}:{number}: got a broken line ({error}), expected one JSON object a line"
                ) from error
            parsed.append(None)
    return parsed


def _line(line: bytes, metrics: bool) -> dict[str, Any]:
    """Parse a line. ValueError if no tracker writes such a line."""
    read = parse_json(line.decode("utf-8"))
    if not isinstance(read, dict):
        raise ValueError(f"a {type(read).__name__}")
    if not is_count(read.get("step")):
        raise ValueError(f"no step, or one that is no whole number: {quoted(read.get('step'))}")
    if metrics:
        for name, value in read.items():
            if name != "warnings" and value is not None and not is_number(value):
                raise ValueError(f"{name} is no number: {quoted(value)}")
        if not isinstance(read.get("warnings", []), list):
            raise ValueError(f"warnings are no list: {quoted(read['warnings'])}")
    return read


def _drop_later_lines(file: Path, step: int) -> None:
    kept = [line for line in _read_lines(file) if line is not None and line["step"] <= step]
    _write_lines(file, kept)


def _write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_text_atomically(file, "".join(json.dumps(line) + "\n" for line in lines))


def _write_line(stream: Any, line: Mapping[str, Any]) -> None:
    # ensure_ascii keeps a lone surrogate of a model's text writable.
    stream.write(json.dumps(line, default=plain) + "\n")
    stream.flush()


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def plain(value: Any) -> Any:
    """numpy and torch values as Python ones; anything else (a date of a user's column) as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def cell(value: Any) -> Any:
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return json.dumps(value, default=plain, ensure_ascii=False)


def _indented(value: Any) -> str:
    return "\n".join("    " + line for line in str(value).splitlines())


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
