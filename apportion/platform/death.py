"""Why an actor's process ended: what the kernel says of it, and what is useful in Ray's words.

Ray's standard text for any unexpected exit mentions the OOM killer and names neither exit code nor signal. So the exit
status comes from the kernel (a pidfd of each actor on this machine, Linux 6.15 and later), and a message says
"out of memory" only where the kernel's count of OOM kills has risen, or where Ray's own memory monitor says so.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import struct
import time
from pathlib import Path

from apportion.platform.process import ProcessInfo

EXIT_SECONDS = 2.0  # for a process that Ray gave up to be gone (it may still write a core dump)
LONGEST_WORDS = 2000  # characters of Ray's text that are kept
SMALLER = "use fewer or smaller actors, or a smaller rollout.kv_cache_gib"

_GET_INFO = (3 << 30) | (64 << 16) | (0xFF << 8) | 11  # PIDFD_GET_INFO of linux/pidfd.h, a struct of 64 bytes
_INFO_EXIT = 1 << 3
_LOST_NODE = re.compile(r"node has (?:died|crashed)")
_OUT_OF_MEMORY = re.compile(r"NODE_OUT_OF_MEMORY|node running low on memory")
_EXIT_CODE = re.compile(r"Worker exits with an exit code (\d+)\.")
_ADVICE = re.compile(r"\s*Some common causes include:.*?(?=\n|$)", re.DOTALL)
_HEADER = re.compile(r"The actor died unexpectedly before finishing this task\.|\t\w+: .*")


class Witness:
    """Exit statuses of processes on this machine, and out-of-memory kills since the last look. One for each process."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}  # pid -> its pidfd
        self._kills = oom_kills()

    def watch(self, info: ProcessInfo | None) -> None:
        """Keep an eye on an actor's process, if it is on this machine and the system has pidfds."""
        if info is None or info.pid in self._files or info.host != socket.gethostname():
            return
        try:
            self._files[info.pid] = os.pidfd_open(info.pid)
        except (AttributeError, OSError):  # no Linux, an old one, no such process, or no file left
            return

    def forget(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def all_well(self) -> None:
        """Nothing died: out-of-memory kills up to now were of other processes."""
        self._kills = oom_kills()

    def killed_for_memory(self, info: ProcessInfo | None) -> bool | None:
        """Whether the kernel counts another out-of-memory kill; None where this process cannot read it, as on another
        machine."""
        now = oom_kills()
        elsewhere = info is not None and info.host != socket.gethostname()
        return None if elsewhere or now is None or self._kills is None else now > self._kills

    def status(self, info: ProcessInfo | None) -> int | None:
        """The exit status of a watched process as `os.wait` gives it; None where it is not known."""
        file = self._files.get(info.pid) if info is not None and info.host == socket.gethostname() else None
        if file is None:
            return None
        deadline = time.monotonic() + EXIT_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            if select.select([file], [], [], left)[0]:
                try:
                    status = _exit_status(file)
                except OSError:  # a kernel before 6.15
                    return None
                if status is not None:
                    return status
            time.sleep(0.02)  # it has ended, and its parent has still to collect it
        return None


def _exit_status(file: int) -> int | None:
    buffer = bytearray(64)
    struct.pack_into("=Q", buffer, 0, _INFO_EXIT)
    fcntl.ioctl(file, _GET_INFO, buffer)
    mask, status = struct.unpack_from("=Q", buffer, 0)[0], struct.unpack_from("=i", buffer, 60)[0]
    return int(status) if mask & _INFO_EXIT else None


def oom_kills(root: Path = Path("/")) -> int | None:
    """Processes that the kernel's OOM killer has ended in this process's cgroup, or on this machine where there is no
    cgroup to ask; None where neither can be read."""
    files = [*_cgroup_files(root), root / "proc/vmstat"]
    for file in files:
        try:
            counts = dict(line.split()[:2] for line in file.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if "oom_kill" in counts:
            return int(counts["oom_kill"])
    return None


def _cgroup_files(root: Path) -> list[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            files.append(root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control")
    return files


def lost_node(error: BaseException) -> bool:
    """Whether Ray speaks of a node that died, and not of one process."""
    return type(error).__name__ in ("LocalRayletDiedError", "NodeDiedError") or bool(_LOST_NODE.search(str(error)))


def cause_of_death(error: BaseException, status: int | None, killed_for_memory: bool | None) -> str:
    """In words. `status` is the process's as `os.wait` gives it, where it is known.

    >>> cause_of_death(Exception("Worker exit detail: Worker exits with an exit code 3."), None, None)
    'exited with code 3 (Ray says: Worker exit detail: Worker exits with an exit code 3.)'
    """
    words = useful_words(str(error))
    if type(error).__name__ == "OutOfMemoryError" or _OUT_OF_MEMORY.search(str(error)):
        return f"out of memory: Ray's memory monitor ended it ({words}); {SMALLER}"
    said = f" (Ray says: {words})"
    if "killed by `ray.kill`" in words:
        return "killed by ray.kill"
    if status is not None and os.WIFSIGNALED(status):
        return _by_signal(os.WTERMSIG(status), killed_for_memory)
    stated = _EXIT_CODE.search(words)
    if stated and ("SIGTERM" in words or "exit_actor" in words):
        return f"exited with code {stated[1]}{said}"
    if status is not None:
        return f"exited with code {os.waitstatus_to_exitcode(status)}"
    if stated:
        return f"exited with code {stated[1]}{said}"
    if killed_for_memory:
        return f"out of memory: its process ended, and the kernel counts an out-of-memory kill since; {SMALLER}{said}"
    return f"its process ended without an exit code: killed by a signal, or left by os._exit{said}"


def _by_signal(number: int, killed_for_memory: bool | None) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number != signal.SIGKILL:
        return f"killed by {name}"
    if killed_for_memory:
        return f"out of memory: the kernel's OOM killer ended it ({name}); {SMALLER}"
    if killed_for_memory is None:
        return f"killed by {name}; `dmesg` says whether the kernel did it for want of memory"
    return f"killed by {name}; not by the kernel for want of memory, which counts no such kill"


def useful_words(text: str) -> str:
    """Ray's text on one line, without ids and without its list of common causes.

    >>> useful_words("Died.\\n\\tpid: 7\\nWorker exit type: X. Some common causes include: (1) the OOM killer")
    'Died. Worker exit type: X.'
    """
    lines = [line for line in text.splitlines() if not _HEADER.fullmatch(line)]
    words = " ".join(_ADVICE.sub("", "\n".join(lines)).split())
    return words[:LONGEST_WORDS]


witness = Witness()
