"""The exit for what Python code prints in this process: our own lines, those of libraries and their loggers, warnings, and the
traceback of an error that nobody catches. Secrets are masked there, line by line.

What C libraries and child programs write goes to the file descriptors directly, past this.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
from typing import Any, TextIO

from apportion.platform.known_secrets import redacted_text

# Control characters of eight bits, and those that turn the direction of writing: no library prints them, and a file that Hydra
# shows may hold them. Escape sequences are left: libraries color what they say.
_STEERING = re.compile(r"[\x80-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
LONGEST_LINE = 2**16  # characters that are held back for the rest of their line


class MaskedStream(io.TextIOBase):
    """A text stream in front of another one. It passes on whole lines, and the rest of one when it is flushed."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._held = ""
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        """In a forked child the thread that held the lock is not there to release it."""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            self._held += text
            end = max(self._held.rfind("\n"), self._held.rfind("\r")) + 1
            if not end and len(self._held) > LONGEST_LINE:
                end = len(self._held)
            if end:
                ready, self._held = self._held[:end], self._held[end:]
                self.stream.write(redacted_text(_STEERING.sub("", ready)))
        return len(text)

    def flush(self) -> None:
        with self._lock:
            if self._held:
                ready, self._held = self._held, ""
                self.stream.write(redacted_text(_STEERING.sub("", ready)))
        if not self.stream.closed:
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.stream.errors

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """The stream behind it belongs to the process."""
        self.flush()


def mask_output() -> None:
    """Put such a stream in place of stdout and stderr, for the rest of this process. Handlers of logging that were made
    before write to it as well."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, MaskedStream):
            continue
        masked = MaskedStream(stream)
        setattr(sys, name, masked)
        for handler in _handlers():
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(masked)


def _handlers() -> list[logging.Handler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
