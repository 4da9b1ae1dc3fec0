"""Notices that Ray itself is lost: its control server (the GCS) died or hangs, or this node's raylet does.

Ray says nothing of it for up to a minute and then ends the driver's process. Actors still answer meanwhile, so there is
time to save. A thread asks Ray every few seconds; `check`, which every wait calls, raises what it found, once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from apportion.platform.errors import ClusterLost
from apportion.platform.session import state_of

EVERY_SECONDS = 3.0
ANSWER_SECONDS = 5.0
STOPPED_SECONDS = 15.0  # a process of Ray that is stopped for so long is lost
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after so long without a GCS, Ray ends each of its processes
LOCAL_RECONNECT_SECONDS, RAYS_RECONNECT_SECONDS = 300, 60  # ours for a local Ray, and Ray's own default
SILENT_SHARE = 1 / 3  # of that time, without an answer: an overloaded machine or a GCS that is restarted is not lost
FINISH_SHARE = 0.6  # of that time, for an update under way to end, so that what it trained can be saved
MARGIN_SECONDS = 5.0
HUNG_SECONDS = 60.0  # past the time when the main thread should have noticed


@dataclass
class Problem:
    """What is wrong, and after how many seconds of it Ray counts as lost."""

    text: str
    seconds: float = 0.0


class Watch:
    """Asks `probe` again and again. `give_up` is called where nobody took the loss: the main thread hangs in Ray."""

    def __init__(
        self, probe: Callable[[], Problem | None], ray_ends_after: float, give_up: Callable[[str], None],
        every: float = EVERY_SECONDS,
    ) -> None:  # fmt: skip
        self.finishing = False  # an update is under way, whose end is worth waiting for
        self._probe, self._every, self._give_up = probe, every, give_up
        self._ray_ends_after = ray_ends_after
        self._since = self._lost_at = 0.0  # when the problem was first seen, and when it counted as a loss
        self._lost: str | None = None
        self._taken = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster-watch", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str | None:
        return self._lost

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(2 * ANSWER_SECONDS)

    def check(self) -> None:
        """Raise ClusterLost where Ray is lost: once, and while `finishing` not before that has had its time."""
        if self._lost is not None and not self._taken and time.monotonic() >= self._due():
            self._taken = True
            raise ClusterLost(self._lost)

    def seconds_left(self) -> float:
        """Until Ray ends the processes; without limit while all is well."""
        if self._lost is None:
            return float("inf")
        return max(0.0, self._since + self._ray_ends_after - MARGIN_SECONDS - time.monotonic())

    def _due(self) -> float:
        return self._since + FINISH_SHARE * self._ray_ends_after if self.finishing else self._lost_at

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            if self._lost is None:
                self._look()
                continue
            limit = self._since + self._ray_ends_after if self._taken else self._due()
            if time.monotonic() > limit + HUNG_SECONDS:
                self._give_up(self._lost)
                return

    def _look(self) -> None:
        problem, now = self._probe(), time.monotonic()
        if problem is None:
            self._since = 0.0
            return
        self._since = self._since or now
        # Two looks at least: one alone may fall into a moment in which the whole session was stopped (Ctrl-Z).
        if now - self._since >= problem.seconds:
            self._lost_at, self._lost = now, problem.text


_current: Watch | None = None


def watch(current: Watch | None) -> None:
    """Make `current` the watch that `check` asks; None ends the earlier one."""
    global _current
    earlier, _current = _current, current
    if earlier is not None:
        earlier.stop()


def lost() -> str | None:
    """What happened to Ray, or None while all is well."""
    return None if _current is None else _current.lost


def check() -> None:
    """Raise ClusterLost where this process's Ray is lost."""
    if _current is not None:
        _current.check()


def seconds_left() -> float:
    return float("inf") if _current is None else _current.seconds_left()


@contextmanager
def finishing() -> Iterator[None]:
    """Within it a loss of Ray waits for the end of what is under way; ClusterLost says where that did not come."""
    current = _current
    if current is not None:
        current.finishing = True
    try:
        yield
    except ClusterLost as error:
        error.between_steps = False
        raise
    finally:
        if current is not None:
            current.finishing = False


def ray_probe(joined: bool, ray_ends_after: float) -> Callable[[], Problem | None]:
    """Asks the Ray that this process has started or joined."""
    import ray

    worker = ray._private.worker
    node, client = worker._global_node, worker.global_worker.gcs_client
    here, address = ray.get_runtime_context().get_node_id(), node.gcs_address
    logs = os.path.join(node.get_session_dir_path(), "logs")
    started = {} if joined else {name: each[0].process.pid for name, each in node.all_processes.items()}

    def probe() -> Problem | None:
        for name, program in (("gcs_server", "control server (GCS)"), ("raylet", "raylet")):
            if (problem := _process_problem(started.get(name), program, logs)) is not None:
                return problem
        try:
            nodes = client.get_all_node_info(timeout=ANSWER_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever its kind, the GCS gave no answer
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Problem(
                f"Ray's control server (GCS) at {address} does not answer ({cause}); {_advice(logs)}",
                SILENT_SHARE * ray_ends_after,
            )
        return _node_problem(nodes, here, logs)

    return probe


def _process_problem(pid: int | None, program: str, logs: str) -> Problem | None:
    state = "" if pid is None or not os.path.exists("/proc/self/stat") else state_of(pid)
    if state in ("X", "Z"):
        return Problem(f"Ray's {program} (pid {pid}) died; {_advice(logs)}")
    if state == "T":
        return Problem(
            f"Ray's {program} (pid {pid}) is stopped (SIGSTOP, or a debugger); {_advice(logs)}", STOPPED_SECONDS
        )
    return None


def _node_problem(nodes: dict[Any, Any], here: str, logs: str) -> Problem | None:
    for node, info in nodes.items():
        if node.hex() == here and info.state != 0:  # 0 is ALIVE in Ray's protocol
            return Problem(
                f"Ray has given this machine up: its raylet died or did not answer for a minute; {_advice(logs)}"
            )
    return None


def _advice(logs: str) -> str:
    return f"Ray's logs are in {logs}; resume the run"
