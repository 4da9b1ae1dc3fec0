"""How a command ended, and whether that is how it may end: done, or one line that names what is wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from apportion import before
from apportion.cli import COMMANDS, _main
from apportion.conf.explain import config_keys
from apportion.conf.preference_schema import STAGES

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
def instead_of_runs(
    train: Callable[..., int], evaluate: Callable[..., int], stage: Callable[..., int]
) -> Iterator[None]:
    """Within it a command that would start a run calls these instead: nothing starts, nothing heavy is imported."""
    stand_ins: dict[str, Any] = {
        "apportion.build": SimpleNamespace(train=train, evaluate=evaluate),
        "apportion.preference_build": SimpleNamespace(train=stage),
    }
    modules, run = {name: sys.modules.get(name) for name in stand_ins}, before._run
    sys.modules.update(stand_ins)
    before._run = lambda *_: None
    try:
        yield
    finally:
        before._run = run
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


def fault(found: Outcome, words: list[str]) -> str | None:
    """What is wrong with how the command of these words ended."""
    if found.trace:
        return "traceback: " + found.trace.strip()
    if found.seconds > SECONDS:
        return f"took {found.seconds:.0f} s"
    if re.search(r"[^\n\t\x20-\x7e\x80-\U0010ffff]|[\x80-\x9f\u202a-\u202e]", found.out + found.err):
        return "control characters on the terminal"
    if found.code == 0:
        return None
    lines = [line for line in found.err.splitlines() if not line.startswith("warning: ")]
    if len(lines) != 1 and not (lines and "-m" in words):  # each run of a sweep has one
        return f"{len(lines)} lines: {lines}"
    for line in lines:
        if len(line) > LONGEST_LINE:
            return f"a line of {len(line)} characters"
        if not line.startswith("error: ") or not _names(line.removeprefix("error: ").partition(": ")[0], words):
            return f"no key or file: {line}"
    return None


OTHERS = (
    "override",
    "run folder",
    "checkpoint",
    "command",
    "state.json",
    "manifest.json",
    "the run's config.yaml",
)  # what a line may begin with


def _names(subject: str, words: list[str]) -> bool:
    """Whether it is a key, a file, or a piece of the command line."""
    subject = re.split(r"\.{3}\([\d,]+ characters\)", subject)[0]
    first = re.split(r"[\s\[]|\.\d", subject)[0].rstrip(",")
    known = subject in OTHERS or subject in COMMANDS or first in _keys() or first.rpartition(".")[0] in _keys()
    return known or subject.startswith("--") or "/" in subject or any(subject and subject in word for word in words)


@functools.cache
def _keys() -> frozenset[str]:
    """Every key, every section, and the groups of files."""
    keys = {"algorithm", "experiment", "lora", "hydra"}
    for config in (config_keys(), *map(config_keys, STAGES.values())):
        for key in config:
            parts = key.split(".")
            keys |= {".".join(parts[: end + 1]) for end in range(len(parts))}
    return frozenset(keys)
