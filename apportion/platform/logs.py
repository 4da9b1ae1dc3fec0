"""Bounds an actor's log file: it keeps its beginning (how the actor started) and its end (why it stopped)."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

MOST_BYTES = 32 * 2**20  # of a log, before its middle is left out
HEAD_BYTES = 2 * 2**20  # kept of its beginning
TAIL_BYTES = 6 * 2**20  # and of its end
LOOK_SECONDS = 1.0
_LINE_BYTES = 65536  # of a line whose beginning is left out, nothing stays, unless it is longer


def keep_short(log: Path) -> None:
    """Look at a log's size again and again, in a thread, as long as this process lives."""

    def look() -> None:
        while not threading.Event().wait(LOOK_SECONDS):
            shorten(log)

    threading.Thread(target=look, name="log-bound", daemon=True).start()


def shorten_all(folder: Path) -> None:
    """Shorten the logs in a folder: an actor may have printed too much in its last moment."""
    for log in folder.glob("*.log"):
        shorten(log)


def shorten(log: Path) -> None:
    """Leave out the middle of a log that is too long, with a line that says so.

    The file stays the same one, since a process and its children append to it. What they write in this moment may be lost.
    """
    with contextlib.suppress(OSError):  # it is gone, or cannot be read: then nothing grows
        if log.stat().st_size <= MOST_BYTES:
            return
        with open(log, "a+b") as file:
            start = file.seek(0, os.SEEK_END) - TAIL_BYTES
            file.seek(start)
            tail = file.read()
            cut = tail.find(b"\n", 0, _LINE_BYTES) + 1
            file.truncate(HEAD_BYTES)
            left_out = start + cut - HEAD_BYTES
            file.write(
                b"\n[... %d bytes left out: a log keeps its beginning and its end ...]\n" % left_out + tail[cut:]
            )
