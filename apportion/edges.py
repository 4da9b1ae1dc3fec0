"""What surrounds every run: errors of the layers below become what the command line shows, a kill becomes an
interruption, trackers are closed, a sweep writes nothing."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import yaml

from apportion.data.errors import DataError as SourceError
from apportion.platform.errors import ApportionError, ConfigError, DataError
from apportion.platform.foreign import yaml_problem
from apportion.platform.messages import brief, say, warn
from apportion.platform.tracking import MultiTracker


@contextmanager
def closing(tracker: MultiTracker) -> Iterator[None]:
    """Close the trackers at the end; where an error is under way, it is that one which the user sees."""
    try:
        yield
    except BaseException:
        try:
            tracker.close()
        except Exception as second:  # noqa: BLE001 - a full disk, say, that the error under way tells of already
            said = _plain(second)
            warn(f"the trackers could not be closed either ({said})")
        raise
    tracker.close()


@contextmanager
def told_first(tracker: MultiTracker | None = None) -> Iterator[None]:
    """Say what went wrong before anything is torn down: that takes its time, and where Ray hangs it may not return."""
    try:
        with row_errors():
            yield
    except ApportionError as error:
        if tracker is not None:
            tracker.close_console()
        tell(error)
        raise


def tell(error: ApportionError) -> None:
    """Print an error, once: its first line as the message, what follows (a traceback, log lines) below it."""
    if error.told:
        return
    error.told = True
    message, _, details = str(error).partition("\n")
    say(f"error: {brief(message)}", sys.stderr)
    if details:
        say(details, sys.stderr)


REFUSED_BY_SYSTEM = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EMFILE", "ENFILE", "ENAMETOOLONG", "EIO", "EFBIG",
                 "ENOTDIR", "EISDIR", "ELOOP", "ESTALE", "ENOLCK")
}  # fmt: skip


@contextmanager
def system_errors() -> Iterator[None]:
    """What the operating system refuses (a full disk, a folder without permission), and a file that is no YAML, in one
    line. A pipe whose reader has gone passes: that is no failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in REFUSED_BY_SYSTEM:  # a library's own (a connection, a time limit): with its traceback
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        raise ApportionError(
            f"{where}got {_plain(error)}, expected the system to allow it: look at free space, paths and permissions"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"got {type(error).__name__}: {yaml_problem(error)}, expected YAML: correct that line"
        ) from error


def _plain(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


@contextmanager
def unsaved_sweeps() -> Iterator[None]:
    """Within it, Hydra's sweeper keeps no multirun.yaml, which would hold every override, secrets too, in clear. Hydra has
    no switch for this; its version is pinned."""
    from hydra.core.plugins import Plugins

    Plugins.instance()  # runs the module below once more when it is first called
    sweeper: Any = import_module("hydra._internal.core_plugins.basic_sweeper")
    whole = sweeper.OmegaConf
    sweeper.OmegaConf = SimpleNamespace(save=lambda *_: None)
    try:
        yield
    finally:
        sweeper.OmegaConf = whole


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
