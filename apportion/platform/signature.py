"""Sign a run's configuration, so that it is known as this user's own, in the folder that it was written to.

A signature is the last line of `config.yaml`: an HMAC of the folder's path and of the text above it. Its key is a file of
the user's outside of every run folder, made when the first run is signed. So a folder that was copied, moved or edited, or
that somebody else made, is not signed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from apportion.platform.files import make_private_file

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
        make_private_file(identity_file(), secrets.token_hex(_KEY_BYTES) + "\n")
        key = _read_key()
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
