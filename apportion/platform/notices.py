"""Lines that an actor wants a person to see while its call is still under way.

An actor appends them to a file beside its log; whoever waits for it prints what is new. Without a log they go to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from apportion.platform.known_secrets import redacted_text
from apportion.platform.messages import say

NOTICES_FILE = "notices.txt"


def notify(line: str) -> None:
    log = os.environ.get("APPORTION_LOG")
    text = redacted_text(" ".join(line.split()))
    say(text, sys.stderr)
    if log:
        with open(Path(log).parent / NOTICES_FILE, "a", encoding="utf-8") as file:
            file.write(text + "\n")


class Notices:
    """Of the actors of one run; `follow` it, and `tell` what is new."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._say = tell or (lambda line: say(line, sys.stderr))
        self._file: Path | None = None
        self._read = 0

    def follow(self, folder: Path) -> None:
        """From now on the notices of actors that log into `folder`; older ones are left."""
        self._file = folder / NOTICES_FILE
        self._read = self._file.stat().st_size if self._file.is_file() else 0

    def tell(self) -> None:
        if self._file is None or not self._file.is_file() or self._file.stat().st_size <= self._read:
            return
        with open(self._file, "rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            self._say(line)


notices = Notices()
