"""Sign a run's configuration, so that it is known as this user's own, in the folder that it was written to.

A signature is the last line of `config.yaml`: an HMAC of the folder's path and of the text above it. Its key is a file of
the user's outside of every run folder, made when the first run is signed. So a folder that was copied, moved or edited, or
that somebody else made, is not signed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

VARIABLE = "APPORTION_IDENTITY"  # the file of the key, where it is not the default one
_MARK = "# signature: "
_KEY_BYTES = 32


def identity_file() -> Path:
    """OSError where there is no home folder to keep it in."""
    given = os.environ.get(VARIABLE)
    try:
        if given:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "apportion" / "identity"
    except RuntimeError as error:  # of `expanduser`
        raise OSError(f"{error}; set {VARIABLE}") from error


def signed(text: str, folder: Path) -> str:
    """The text of a configuration with its signature. OSError where the user's key cannot be read or made."""
    try:
        key = _read_key()
    except FileNotFoundError:
        key = _make_key()
    return f"{text}{_MARK}{_tag(key, text, folder)}\n"


def unsigned_because(text: str, folder: Path) -> str | None:
    """Why a configuration is not known as this user's own in `folder`; None where it is."""
    body, mark, tag = text.rpartition(_MARK)
    if not mark:
        return "its config.yaml has no signature: somebody else or an earlier version of apportion wrote it"
    try:
        key = _read_key()
    except OSError as error:
        return f"your key for signatures cannot be read ({error})"
    if not hmac.compare_digest(tag.strip().encode(), _tag(key, body, folder).encode()):
        return "its signature is of another user, folder or text: it was copied, moved or edited"
    return None


def _tag(key: bytes, text: str, folder: Path) -> str:
    message = b"\0".join((b"apportion run 1", os.fsencode(folder.resolve()), text.encode("utf-8")))
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def _read_key() -> bytes:
    """OSError for a file that others could have read or written: what they sign would be taken for this user's."""
    file = identity_file()
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(
                f"{file}: got a file that others can read or own, expected your own: chmod 600 {file}"
            )
        text = stream.read(4 * _KEY_BYTES).strip()
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError as error:
        raise OSError(f"{file}: got no key of {_KEY_BYTES} bytes as hexadecimal digits: remove it") from error
    if len(key) != _KEY_BYTES:
        raise OSError(f"{file}: got a key of {len(key)} bytes, expected {_KEY_BYTES}: remove it")
    return key


def _make_key() -> bytes:
    """Make the file whole or not at all: of two processes that make it at once, one is first, and both use its key."""
    file = identity_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(_KEY_BYTES) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return _read_key()
