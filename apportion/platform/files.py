"""Write files that are there whole or not at all, and on the disk when the call returns."""

from __future__ import annotations

import ctypes
import os
import secrets
from contextlib import suppress
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def write_text_atomically(file: Path, text: str) -> None:
    """Replace `file` by `text`: a reader, or a machine that stops, sees the old text or the new one."""
    partial = file.with_name(f".{file.name}.partial-{secrets.token_hex(3)}")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_to_disk(file.parent)


def make_private_file(file: Path, text: str) -> None:
    """Make a file that its owner alone can read, unless it is there. Of several processes that make it at once one is first,
    and the file is its own: it is whole from the beginning. OSError where it cannot be made."""
    partial = file.with_name(f".{file.name}.partial-{secrets.token_hex(3)}")
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, so that neither is ever missing; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0
