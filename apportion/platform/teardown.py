"""Ends a run's actors, and its own Ray, within a limit: also where Ray's calls do not return any more."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from apportion.platform import health, progress
from apportion.platform.messages import say, warn
from apportion.platform.session import (
    MARK,
    Watcher,
    end_marked,
    keep_failed,
    left_after,
    own,
    remove_leftovers,
    remove_session,
    sessions_of,
)

RAY_SECONDS = 20.0  # for Ray to end by itself
LOST_SECONDS = 3.0  # the same where it is known to be lost
LAST_SECONDS = 5.0  # for a call into Ray to return, once Ray's processes are gone

_stuck = False


def leave(code: int) -> int:
    """The exit code; where a call into Ray never returned, end the process at once, since its exit would wait for it."""
    if _stuck:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class Remains:
    """What a run's actors, and its local Ray, would leave behind. Made before Ray starts, so that a start that is
    interrupted leaves nothing either."""

    def __init__(self, root: Path | None) -> None:
        """`root` is the folder in which Ray will make its session's; None where a cluster is joined."""
        self.mark = secrets.token_hex(8)
        self._root = root
        self._since = time.time()
        self._session: Path | None = None
        self._lock: IO[str] | None = None
        self._watcher: Watcher | None = None
        self._kept = False
        if root is not None:
            os.environ[MARK] = self.mark  # what Ray starts inherits it
            self._watcher = Watcher(self.mark, root)

    def started(self) -> None:
        """Ray runs: its session's folder is ours, earlier ones without a driver go, and Ray is watched."""
        import ray

        node = ray._private.worker._global_node
        if node is None:  # Ray's client mode: a proxy holds the connection to the cluster
            return
        default = health.RAYS_RECONNECT_SECONDS if self._root is None else health.LOCAL_RECONNECT_SECONDS
        if self._root is not None:
            self._session = Path(node.get_session_dir_path())
            with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it but we
                self._lock = own(self._session, self.mark)
            remove_leftovers(self._session.parent)
        ends_after = float(os.environ.get(health.RECONNECT, default))
        probe = health.ray_probe(self._root is None, ends_after)
        health.watch(health.Watch(probe, ends_after, self._give_up))

    def end(self, handles: Sequence[Any], failed: bool = False) -> None:
        """Leave nothing running. `failed`: an error names Ray's logs, so they stay."""
        global _stuck
        lost = health.lost()
        with contextlib.suppress(KeyboardInterrupt):
            health.watch(None)  # it asks Ray, which ends now
        self._decide(keep=failed or lost is not None)
        shared = self.mark if self._root is None else None
        asking = threading.Thread(target=_end_ray, args=(handles, shared), name="ray-shutdown", daemon=True)
        asking.start()
        with contextlib.suppress(KeyboardInterrupt):  # asked again: what remains is killed at once
            asking.join(RAY_SECONDS if lost is None else LOST_SECONDS)
        with _uninterrupted():
            self._end_processes(lost is not None)
            asking.join(LAST_SECONDS)
            if asking.is_alive():
                _stuck = True
                atexit.unregister(_shutdown_of_ray())
            self._tidy()

    def _end_processes(self, lost: bool) -> None:
        if self._root is None and not lost:  # the cluster's raylet ends them, in a moment
            left_after(self.mark, LAST_SECONDS)
        if left := end_marked(self.mark):
            warn(f"processes {left} cannot be ended; look at what they wait for")

    def _decide(self, keep: bool) -> None:
        """Whether Ray's logs stay. Said in the folder before Ray's processes end: their end may end this process."""
        self._kept = keep
        if keep:
            for session in self._sessions():
                keep_failed(session, self.mark)

    def _tidy(self) -> None:
        if self._lock is not None:
            self._lock.close()
        for session in [] if self._kept else self._sessions():
            remove_session(session)
        if os.environ.get(MARK) == self.mark:
            del os.environ[MARK]
        if self._watcher is not None:
            self._watcher.dismiss()

    def _sessions(self) -> list[Path]:
        if self._session is not None:
            return [self._session]
        return [] if self._root is None else sessions_of(self._root, os.getpid(), self._since)

    def _give_up(self, problem: str) -> None:
        """Called by the watch where the main thread hangs in a call into Ray: nothing else can end this process."""
        say(f"error: {problem}; this process hangs in a call into Ray and ends now", sys.stderr)
        self._decide(keep=True)
        end_marked(self.mark)
        self._tidy()
        os._exit(1)


def _end_ray(handles: Sequence[Any], mark: str | None) -> None:
    """`mark` is that of a run in a cluster that lives on."""
    import ray

    for handle in handles:
        with contextlib.suppress(Exception):  # it may be gone already, and so may Ray
            ray.kill(handle)
    if mark is not None:
        with contextlib.suppress(Exception):
            progress.forget(mark)
    with contextlib.suppress(Exception):  # what Ray cannot end is killed afterwards
        ray.shutdown()


def _shutdown_of_ray() -> Any:
    import ray

    return ray._private.worker.shutdown


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is left takes seconds, and an interruption in its middle would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:  # one that Python did not set
                signal.signal(number, handler)
