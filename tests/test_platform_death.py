"""Why an actor ended: from the kernel's exit status and count of OOM kills, and from Ray's own texts (2.60)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apportion.platform import death
from apportion.platform.cluster import Actor, Call, explain
from apportion.platform.death import Witness, cause_of_death, lost_node, oom_kills, useful_words
from apportion.platform.process import ProcessInfo

HEADER = """The actor died unexpectedly before finishing this task.
\tclass_name: PolicyWorker
\tactor_id: bfa220ffc2e46528555a098901000000
\tpid: 7481
\tnamespace: grpo run
\tip: 192.0.2.2
"""
DEAD = "The actor is dead because its worker process has died. Worker exit type: "
# For SIGKILL, SIGSEGV and os._exit(3) alike.
END_OF_FILE = (
    f"{HEADER}{DEAD}SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of "
    "file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray "
    "stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error. If the "
    "process was killed by the kernel OOM killer (verifiable by checking for OOM in dmesg of the OOMing node), consider "
    "enabling resource isolation via --enable-resource-isolation to prevent node deaths by resource contention and "
    "significant loss of progress by uninformed kernel OOM killing."
)
SYS_EXIT = (
    f"{HEADER}{DEAD}SYSTEM_ERROR Worker exit detail: Worker exits unexpectedly. Worker exits with an exit code 3."
)
TERMINATED = (
    f"{HEADER}{DEAD}SYSTEM_ERROR Worker exit detail: Worker exits unexpectedly. Worker exits with an exit code 1. The "
    "process receives a SIGTERM."
)
RAY_KILL = f"{HEADER}The actor is dead because it was killed by `ray.kill`."
OWNERS_NODE = (
    f"{HEADER}The actor is dead because its owner has died. Owner Id: 01000000ffff Owner Ip address: 192.0.2.2 Owner "
    "worker exit type: SYSTEM_ERROR Worker exit detail: Owner's node has crashed."
)
ITS_NODE = f"{HEADER}The actor died because its node has died. Node Id: 65a7b46bebcc\n\tthe actor's node was terminated unexpectedly: health check failed"
MONITOR = f"{HEADER}{DEAD}NODE_OUT_OF_MEMORY Worker exit detail: 1 worker(s) were killed due to the node running low on memory."


@pytest.mark.parametrize(
    ("text", "status", "killed", "said"),
    [
        (END_OF_FILE, signal.SIGKILL, False, "killed by SIGKILL; not by the kernel for want of memory"),
        (END_OF_FILE, signal.SIGKILL, None, "killed by SIGKILL; `dmesg` says whether the kernel did it"),
        (END_OF_FILE, signal.SIGKILL, True, "out of memory: the kernel's OOM killer ended it (SIGKILL); use fewer"),
        (END_OF_FILE, signal.SIGSEGV, True, "killed by SIGSEGV"),
        (END_OF_FILE, 3 << 8, True, "exited with code 3"),
        (END_OF_FILE, 0, False, "exited with code 0"),
        (END_OF_FILE, None, False, "its process ended without an exit code: killed by a signal, or left by os._exit"),
        (
            END_OF_FILE,
            None,
            True,
            "out of memory: its process ended, and the kernel counts an out-of-memory kill since",
        ),
        (SYS_EXIT, None, None, "exited with code 3 (Ray says: "),
        (TERMINATED, 1 << 8, False, "exited with code 1 (Ray says: "),
        (RAY_KILL, signal.SIGKILL, False, "killed by ray.kill"),
        (MONITOR, signal.SIGKILL, False, "out of memory: Ray's memory monitor ended it (The actor is dead"),
    ],
)
def test_a_death_is_told_by_what_the_kernel_and_ray_know(text, status, killed, said):
    cause = cause_of_death(Exception(text), status, killed)
    assert cause.startswith(said)
    assert "common causes" not in cause and "actor_id" not in cause
    assert ("out of memory" in cause) == said.startswith("out of memory")


def test_what_is_useful_in_rays_words_is_kept_whole():
    assert useful_words(TERMINATED) == (
        f"{DEAD}SYSTEM_ERROR Worker exit detail: Worker exits unexpectedly. Worker exits with an exit code 1. The process "
        "receives a SIGTERM."
    )
    assert useful_words(END_OF_FILE).endswith("a connection error code 2. End of file.")
    assert "health check failed" in useful_words(ITS_NODE)
    assert len(useful_words("word " * 5000)) == death.LONGEST_WORDS


def test_a_node_that_died_is_not_told_as_the_death_of_an_actor():
    import ray

    assert [lost_node(Exception(t)) for t in (OWNERS_NODE, ITS_NODE, END_OF_FILE, MONITOR)] == [
        True,
        True,
        False,
        False,
    ]
    assert lost_node(ray.exceptions.LocalRayletDiedError())
    actor = Actor("policy-0", None, "", ProcessInfo(7, "host-b", ""))
    error = ray.exceptions.RayActorError("7", OWNERS_NODE)
    message = str(explain(error, Call(actor, "update", ["ref"]), "update of step 3"))
    assert message.startswith(
        "Ray's node of policy-0 (pid 7 on host-b) died in update of step 3 (update), and the actor with it: The actor is "
        "dead because its owner has died."
    )
    assert message.endswith("; look for the cause in that node's raylet logs and in dmesg") and "\n" not in message


def test_the_exit_status_of_a_process_that_is_gone_is_known_where_the_kernel_tells_it():
    witness, command = Witness(), [sys.executable, "-c", "input(); import os; os._exit(3)"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    here = ProcessInfo(process.pid, socket.gethostname(), "")
    witness.watch(here)
    witness.watch(here)
    process.communicate(b"\n")
    kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert witness.status(here) == (3 << 8 if kernel >= (6, 15) else None)
    assert witness.status(ProcessInfo(process.pid, "another", "")) is None
    assert witness.status(None) is None
    witness.forget()
    assert witness.status(here) is None


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/job/7", "sys/fs/cgroup/job/7/memory.events"),
        ("4:memory:/job/7\n0::/", "sys/fs/cgroup/memory/job/7/memory.oom_control"),
        ("0::/", "proc/vmstat"),
    ],
)
def test_kills_for_memory_are_counted_by_the_cgroup_or_else_by_the_machine(tmp_path, group, file):
    put(tmp_path / "proc/self/cgroup", group + "\n")
    assert oom_kills(tmp_path) is None
    put(tmp_path / "proc/vmstat", "pgfault 5\noom_kill 9\n")
    put(tmp_path / file, "low 0\noom 3\noom_kill 2\n")
    assert oom_kills(tmp_path) == 2


def test_only_kills_since_the_last_answer_count_and_only_on_this_machine(monkeypatch):
    counts = iter([4, 4, 5, 5, 5, 5])
    monkeypatch.setattr(death, "oom_kills", lambda: next(counts))
    witness, here = Witness(), ProcessInfo(1, socket.gethostname(), "")
    assert witness.killed_for_memory(here) is False
    assert witness.killed_for_memory(here) is True
    witness.all_well()
    assert witness.killed_for_memory(None) is False
    assert witness.killed_for_memory(ProcessInfo(1, "another", "")) is None


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
