"""One process a run: two that resume the same folder would replace each other's metrics and checkpoints.

The lock is the operating system's, so it ends with its process however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from apportion.platform.errors import ConfigError
from apportion.platform.foreign import open_to_append
from apportion.platform.messages import warn

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder, to write in it; ConfigError where another process does."""
    with open_to_append(folder / LOCK_FILE) as file:
        if not _locked(file, fcntl.LOCK_EX, folder):
            raise ConfigError(
                f"run folder: got {folder}, which another process is running; expected a run that has ended: wait for "
                "that process, or stop it"
            )
        yield


def is_held(folder: Path) -> bool:
    """Whether a process runs in this folder now."""
    if not (folder / LOCK_FILE).is_file():
        return False
    with open(folder / LOCK_FILE) as file:
        return not _locked(file, fcntl.LOCK_SH, folder)  # on NFS a file that is open for reading takes no other


def _locked(file: IO[str], mode: int, folder: Path) -> bool:
    """Take the lock until the file is closed; False where it is taken."""
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on CIFS
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_once(str(folder.parent))
    return True


@functools.cache
def _warn_once(runs: str) -> None:
    warn(f"{runs} is on a file system without locks: start no second process on a run")
