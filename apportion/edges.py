"""What surrounds every run: errors of the layers below become what the command line shows, a kill becomes an
interruption, trackers are closed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from apportion.data.errors import DataError as SourceError
from apportion.platform.errors import ConfigError, DataError
from apportion.platform.tracking import MultiTracker


@contextmanager
def closing(tracker: MultiTracker) -> Iterator[None]:
    try:
        yield
    finally:
        tracker.close()


@contextmanager
def refusals() -> Iterator[None]:
    """Layers below raise what they know of; here it becomes what the command line shows."""
    try:
        with row_errors():
            yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def row_errors() -> Iterator[None]:
    """A row that is found to be unusable while a run goes on is no mistake of the program: its line, no traceback."""
    try:
        yield
    except SourceError as error:
        raise DataError(str(error)) from error


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """A polite kill, or a terminal that closes, ends a run as Ctrl-C does: actors stopped, trackers closed.

    Under nohup, which ignores a closing terminal, the run goes on.
    """

    def interrupt(signum: int, frame: Any) -> None:
        if signum == signal.SIGHUP:  # shell and kernel may both say it: a second one would cut the tidying short
            signal.signal(signum, signal.SIG_IGN)
        raise KeyboardInterrupt

    ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in ends}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
