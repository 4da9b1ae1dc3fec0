"""How a command ended, and whether that is how it may end: done, or one line that names what is wrong."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from apportion.cli import _main

LONGEST_LINE = 2000  # characters; a value of 5,000 letters is not quoted whole
SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float
    trace: str = ""


@contextlib.contextmanager
def instead_of_runs(train: Callable[..., int], evaluate: Callable[..., int]) -> Iterator[None]:
    """Within it a command that would start a run calls these instead: nothing starts, nothing heavy is imported."""
    modules = {name: sys.modules.get(name) for name in ("apportion.build", "apportion.preference_build")}
    stand_in: Any = SimpleNamespace(train=train, evaluate=evaluate)
    sys.modules.update(dict.fromkeys(modules, stand_in))
    try:
        yield
    finally:
        for name, module in modules.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def outcome(words: list[str]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    code, trace, start = -1, "", time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = _main(words)
        except Exception:  # noqa: BLE001 - that there is none is what is tested
            trace = traceback.format_exc()
    return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - start, trace)


def fault(found: Outcome, names: str) -> str | None:
    """What is wrong with it; `names` is a pattern that the error line has to begin with."""
    if found.trace:
        return "traceback: " + " | ".join(found.trace.strip().splitlines()[-3:])
    if found.seconds > SECONDS:
        return f"took {found.seconds:.0f} s"
    if re.search(r"[^\n\t\x20-\x7e\x80-\U0010ffff]|[\x80-\x9f\u202a-\u202e]", found.out + found.err):
        return "control characters on the terminal"
    if found.code == 0:
        return None
    lines = [line for line in found.err.splitlines() if not line.startswith("warning: ")]
    if len(lines) != 1:
        return f"{len(lines)} lines"
    if len(lines[0]) > LONGEST_LINE:
        return f"a line of {len(lines[0])} characters"
    if not re.match(rf"error: (?:{names})", lines[0]):
        return "no key or file"
    return None
