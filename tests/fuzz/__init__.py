"""Generators of broken input. `make test` runs a few cases of each, APPORTION_FUZZ=N runs N."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def cases(few: int) -> range:
    """Seeds to run: `few`, or as many as APPORTION_FUZZ says."""
    return range(int(os.environ.get("APPORTION_FUZZ", few)))


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
