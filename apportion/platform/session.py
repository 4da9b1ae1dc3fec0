"""The processes and the folder that a local Ray leaves behind, and the watcher that removes them with their driver.

Ray ends most of its processes with the driver, but its agents stay for up to a minute after a kill, and its session
folder stays for good. Every process of our own Ray, and every child of one, inherits a mark in its environment.
This file also runs as a program (the watcher), so it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

MARK = "APPORTION_CLUSTER"  # in the environment of every process of one run's actors; a local Ray's own as well
OWNER_FILE = "apportion.json"  # in a session's folder; its owner holds a lock on it for life
FAILED_SESSIONS_KEPT = 3
END_SECONDS = 10.0  # for killed processes to be gone
_POLL_SECONDS = 0.1


# processes


def marked(mark: str) -> list[int]:
    """Living processes of this user, other than this one, with `mark` in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0") and state_of(int(process.name)) not in "ZX":
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def state_of(pid: int) -> str:
    """The kernel's letter for a process: R, S, D, T (stopped), Z (ended), or X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def end_marked(mark: str, seconds: float = END_SECONDS) -> list[int]:
    """Kill every process with `mark`, those that are started meanwhile too; the ones left after `seconds`."""
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(_POLL_SECONDS)
    return []


def left_after(mark: str, seconds: float) -> list[int]:
    """Processes with `mark` that do not end by themselves within `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return left


# folders


def own(session: Path, mark: str) -> IO[str]:
    """Make this process the owner of a session's folder, until it ends or closes the returned file.

    The file gets its name once it is whole and locked: another run that starts now would take it for a dead driver's.
    """
    unnamed = session / f"{OWNER_FILE}.{os.getpid()}"
    file = open(unnamed, "a+", encoding="utf-8")  # noqa: SIM115 - its lock lasts as long as it is open
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _write_owner(file, mark, failed=False)
    unnamed.rename(session / OWNER_FILE)
    return file


def keep_failed(session: Path, mark: str) -> None:
    """Mark a session's folder as one that an error names: of these the newest stay."""
    with contextlib.suppress(OSError), open(session / OWNER_FILE, "a+", encoding="utf-8") as file:
        _write_owner(file, mark, failed=True)


def _write_owner(file: IO[str], mark: str, failed: bool) -> None:
    file.truncate(0)
    file.write(json.dumps({"mark": mark, "failed": failed}))
    file.flush()


def sessions_of(root: Path, pid: int, since: float) -> list[Path]:
    """Folders of the sessions that process `pid` has started since a time: Ray names them by it."""
    found = []
    for folder in root.glob(f"session_*_{pid}"):
        with contextlib.suppress(OSError):
            status = folder.stat()
            if status.st_uid == os.getuid() and status.st_ctime >= since - 1:
                found.append(folder)
    return found


def remove_session(session: Path) -> None:
    """Remove a session's folder, and Ray's link to the latest one where it leads there."""
    latest = session.parent / "session_latest"
    with contextlib.suppress(OSError):
        if Path(os.readlink(latest)).name == session.name:
            latest.unlink()
    shutil.rmtree(session, ignore_errors=True)


def remove_leftovers(root: Path) -> list[Path]:
    """Remove folders of our own sessions whose driver is gone, except the newest that an error names.

    A folder without an owner file is not ours. One that another user owns, whose driver lives (it holds the lock) or of
    which a process still runs stays.
    """
    removed: list[Path] = []
    failed: list[Path] = []
    for folder in sorted(root.glob("session_*"), reverse=True):  # their names begin with the time
        owner = _dead_owner(folder)
        if owner is None:
            continue
        if owner.get("failed") and len(failed) < FAILED_SESSIONS_KEPT:
            failed.append(folder)
        else:
            remove_session(folder)
            removed.append(folder)
    return removed


def _dead_owner(folder: Path) -> dict[str, object] | None:
    """What the owner file says, where this user owned the session and nothing of it lives any more."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return None
        with open(folder / OWNER_FILE, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return None
    owner = _owner(folder)
    return None if marked(str(owner.get("mark"))) else owner


def _owner(session: Path) -> dict[str, object]:
    """What the owner file says; nothing where there is none, or a kill left half of it."""
    try:
        return dict(json.loads((session / OWNER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


# the watcher


class Watcher:
    """A process that outlives the driver by some seconds: it ends what the driver's Ray leaves and removes its folders."""

    def __init__(self, mark: str, root: Path) -> None:
        program = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark, str(root)]
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        # In its own session, so that a terminal's Ctrl-C, which the driver handles, does not reach it.
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
            cwd="/", start_new_session=True, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def dismiss(self) -> None:
        """The driver has tidied up itself."""
        try:
            self._process.communicate("done", timeout=END_SECONDS)
        except subprocess.TimeoutExpired:  # it is stopped, say; there is nothing left for it to do
            self._process.kill()
            self._process.wait()


def watch(driver: int, mark: str, root: Path, since: float) -> None:
    """Wait until the driver says `done` or is gone; then leave nothing of it."""
    said = b""
    while said != b"done" and os.getppid() == driver:  # a child of the driver's may hold the pipe open
        if select.select([0], [], [], 1.0)[0]:
            piece = os.read(0, 64)
            said += piece
            if not piece:
                break
    if said == b"done":
        return
    end_marked(mark, 60.0)
    for session in sessions_of(root, driver, since):
        if not _owner(session).get("failed"):
            remove_session(session)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a scheduler's are for every process of a job
        signal.signal(number, signal.SIG_IGN)
    watch(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), time.time())
