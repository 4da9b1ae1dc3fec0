"""Generators of broken input. `make test` tries a few cases of each kind, `make fuzz` thousands.

A case is known by its number: the same number gives the same input. APPORTION_FUZZ=N tries N cases of each kind, from
number APPORTION_FUZZ_FIRST (0) on.
"""

import faulthandler
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 30  # that one case may take


def cases(few: int) -> range:
    """Numbers of the cases to try: `few` of them, or as many as APPORTION_FUZZ says."""
    first = int(os.environ.get("APPORTION_FUZZ_FIRST", 0))
    return range(first, first + int(os.environ.get("APPORTION_FUZZ", few)))


class Hang(BaseException):
    """Not an Exception: code that reads damaged files catches many of those, an OSError such as TimeoutError among them."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise Hang where what is within takes longer."""

    def late(*_: object) -> None:
        raise Hang(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_all(kind: str, few: int, case: Callable[[int], str | None]) -> None:
    """Try each case, which returns what is wrong or None. Goes on after a fault, and fails with all of them at the end."""
    faults = []
    numbers = cases(few)
    for number in numbers:
        with _noted(kind, number):
            try:
                with at_most(SECONDS):
                    wrong = case(number)
            except (Exception, Hang) as error:  # noqa: BLE001 - it is what is looked for
                wrong = "".join(traceback.format_exception(error)).strip()
            if wrong is not None:
                faults.append(f"case {number} of {kind}: {wrong}")
        _note(kind, number, done=True, fault=None if wrong is None else faults[-1])
    assert not faults, "\n".join(
        [*faults, f"{len(faults)} of {len(numbers)} {kind}; `make fuzz SEED=n` tries case n alone"]
    )


@contextmanager
def _noted(kind: str, number: int) -> Iterator[None]:
    """Say which case runs; where it hangs in code that no signal interrupts, leave the stacks and end the process."""
    report = os.environ.get("APPORTION_FUZZ_REPORT")
    if report is None:
        yield
        return
    _note(kind, number, done=False)
    with open(report + ".stacks", "w") as stacks:
        faulthandler.dump_traceback_later(SECONDS + 10, exit=True, file=stacks)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _note(kind: str, number: int, *, done: bool, fault: str | None = None) -> None:
    """For `python -m fuzz`, which may have to tell after this process has died."""
    if report := os.environ.get("APPORTION_FUZZ_REPORT"):
        with open(report, "a") as file:
            line = {"kind": kind, "case": number, "done": done, "fault": fault, "time": round(time.time(), 1)}
            file.write(json.dumps(line) + "\n")
