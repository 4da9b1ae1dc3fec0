"""Record what a check measured, and print it as a table and as JSON.

Equality is asserted: `Record.hold` gives a figure a bound, and a part with a figure beyond its bound has failed. Speed
and memory are reported: `Record.say`.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apportion.platform.errors import nearest

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


class Skipped(Exception):
    """This part cannot run here; the message says why."""


@dataclass
class Figure:
    name: str
    value: float | str
    unit: str = ""
    bound: float | None = None  # the largest value that is right; None: reported only

    @property
    def ok(self) -> bool:
        """NaN and text meet no bound."""
        return self.bound is None or (isinstance(self.value, int | float) and self.value <= self.bound)


@dataclass
class Outcome:
    part: str
    what: str
    status: str
    reason: str = ""  # why it was skipped or failed
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One check. `run` fills a record, raises `Skipped`, or raises whatever went wrong."""

    name: str
    what: str
    run: Callable[[Record], None]
    limit_seconds: float = 120.0  # of its process


class Record:
    """Figures of one part, written to `path` as they come, so that a process that dies leaves those it had."""

    def __init__(self, part: Part, device: str, path: Path | None = None) -> None:
        self.device = device  # "cuda" or "cpu"
        self.outcome = Outcome(part.name, part.what, FAILED, "did not finish")
        self._path = path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def say(self, name: str, value: float | str, unit: str = "") -> None:
        """Report a figure."""
        self._add(Figure(name, value, unit))

    def hold(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """Report a figure that must be at most `bound`."""
        self._add(Figure(name, value, unit, bound))

    def _add(self, figure: Figure) -> None:
        self.outcome.figures.append(figure)
        self.write()

    def write(self) -> None:
        if self._path is not None:
            self._path.write_text(json.dumps(asdict(self.outcome)))


def run_here(part: Part, device: str, path: Path | None = None) -> Outcome:
    """Run one part in this process. Its error becomes its outcome, so that the other parts go on."""
    record, start = Record(part, device, path), time.perf_counter()
    outcome = record.outcome
    try:
        part.run(record)
        beyond = [figure.name for figure in outcome.figures if not figure.ok]
        outcome.status, outcome.reason = (FAILED, f"beyond its bound: {', '.join(beyond)}") if beyond else (OK, "")
    except Skipped as reason:
        outcome.status, outcome.reason = SKIPPED, str(reason)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported as this part's
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        outcome.reason = f"{type(error).__name__}: {_one_line(str(error))} ({place})"
    outcome.seconds = time.perf_counter() - start
    record.write()
    return outcome


def read_outcome(path: Path) -> Outcome | None:
    """What `run_here` wrote in another process; None where it wrote nothing."""
    if not path.is_file():
        return None
    raw = json.loads(path.read_text())
    return Outcome(**raw | {"figures": [Figure(**figure) for figure in raw["figures"]]})


def find(parts: Iterable[Part], names: list[str]) -> list[Part]:
    """The parts with these names, all where none is given. ValueError names one that does not exist."""
    known = {part.name: part for part in parts}
    for name in names:
        if name not in known:
            raise ValueError(f"part: got {name!r}, expected some of {', '.join(known)}{nearest(name, known)}")
    return [known[name] for name in names] if names else list(known.values())


def show(outcome: Outcome) -> str:
    """One part as lines of the table."""
    reason = f": {outcome.reason}" if outcome.reason else ""
    lines = [f"{outcome.part:<14} {outcome.status:<8} {outcome.seconds:>6.1f} s  {outcome.what}{reason}"]
    for figure in outcome.figures:
        value = figure.value if isinstance(figure.value, str) else _number(figure.value)
        shown = f"{value} {figure.unit}".rstrip()
        bound = "" if figure.bound is None else f"at most {_number(figure.bound)}{'' if figure.ok else ', FAILED'}"
        lines.append(f"    {figure.name:<60} {shown:<24} {bound}".rstrip())
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> str:
    """The last line: counts, and the names of what failed or was skipped."""
    words = []
    for status in (OK, FAILED, SKIPPED):
        names = [outcome.part for outcome in outcomes if outcome.status == status]
        listed = f" ({', '.join(names)})" if names and status != OK else ""
        words.append(f"{len(names)} {status}{listed}")
    return ", ".join(words)


def as_json(tool: str, machine: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    """What `--out` writes. Each figure says what was expected of it, None where it is only reported."""
    parts = []
    for outcome in outcomes:
        figures = [asdict(figure) | {"ok": figure.ok} for figure in outcome.figures]
        parts.append(asdict(outcome) | {"figures": figures})
    return {
        "tool": tool,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine,
        "parts": parts,
    }


def exit_status(outcomes: list[Outcome]) -> int:
    return int(any(outcome.status == FAILED for outcome in outcomes))


def _one_line(text: str) -> str:
    """Enough of an error to act on."""
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:400]}..."


def _number(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
