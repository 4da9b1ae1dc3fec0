"""What a local Ray leaves behind, and who removes it: processes with a mark, folders with an owner, the watcher."""

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apportion.platform import session
from apportion.platform.session import (
    FAILED_SESSIONS_KEPT,
    MARK,
    OWNER_FILE,
    end_marked,
    keep_failed,
    left_after,
    marked,
    own,
    remove_leftovers,
    remove_session,
    sessions_of,
    state_of,
)

DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from apportion.platform.session import MARK, Watcher, own
root, mark, end = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
watcher = Watcher(mark, root)
session = root / f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
session.mkdir()
lock = own(session, mark)
subprocess.Popen(["sleep", "60"], env=os.environ | {MARK: mark})
if end == "done":
    watcher.dismiss()
print(watcher.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def mark():
    value = secrets.token_hex(8)
    yield value
    end_marked(value)


def sleeping(mark: str) -> subprocess.Popen:
    return subprocess.Popen(["sleep", "60"], env=os.environ | {MARK: mark})


def owned(root, name: str, mark: str = "of nobody", failed: bool = False):
    folder = root / name
    (folder / "logs").mkdir(parents=True)
    (folder / OWNER_FILE).write_text(json.dumps({"mark": mark, "failed": failed}))
    return folder


def test_marked_processes_are_killed_stopped_ones_too_and_no_others(mark):
    mine, stopped, other = sleeping(mark), sleeping(mark), sleeping(secrets.token_hex(8))
    stopped.send_signal(signal.SIGSTOP)
    assert left_after(mark, 0.2) == sorted([mine.pid, stopped.pid]) or set(marked(mark)) == {mine.pid, stopped.pid}
    assert end_marked(mark) == []
    assert (mine.wait(5), stopped.wait(5)) == (-signal.SIGKILL, -signal.SIGKILL)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_that_has_ended_is_no_longer_one(mark):
    child = sleeping(mark)
    child.kill()
    deadline = time.monotonic() + 5
    while state_of(child.pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(child.pid) == "Z" and marked(mark) == []
    child.wait()
    assert state_of(child.pid) == "X"


def wait_for_ignored(pid: int, number: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        [line] = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("SigIgn:")]
        if int(line.split()[1], 16) >> (number - 1) & 1:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("end", ["killed", "done"])
def test_the_watcher_ends_what_a_killed_driver_leaves_and_nothing_of_one_that_tidied_up(tmp_path, mark, end):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), mark, end], stdout=subprocess.PIPE, text=True
    )
    watcher = int(driver.stdout.readline())
    assert len(marked(mark)) == 1 and len(list(tmp_path.iterdir())) == 1
    if end == "killed":  # a scheduler asks every process of a job to end: the watcher stays for the others
        wait_for_ignored(watcher, signal.SIGTERM)
        os.kill(watcher, signal.SIGTERM)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while state_of(watcher) not in "XZ" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state_of(watcher) in "XZ"
    left = (len(marked(mark)), len(list(tmp_path.iterdir())))
    assert left == ((0, 0) if end == "killed" else (1, 1))


def test_a_watcher_that_does_not_answer_does_not_keep_the_driver(tmp_path, mark, monkeypatch):
    monkeypatch.setattr(session, "END_SECONDS", 0.2)
    watcher = session.Watcher(mark, tmp_path)
    os.kill(watcher.pid, signal.SIGSTOP)
    watcher.dismiss()
    assert state_of(watcher.pid) == "X"


def test_a_watcher_ends_while_a_child_of_the_driver_holds_its_pipe(tmp_path, mark):
    watcher = session.Watcher(mark, tmp_path)
    held = os.dup(watcher._process.stdin.fileno())
    start = time.monotonic()
    watcher.dismiss()
    assert (watcher._process.returncode, time.monotonic() - start < session.END_SECONDS / 2) == (0, True)
    os.close(held)


def test_sessions_of_dead_drivers_are_removed_and_all_others_stay(tmp_path, mark):
    dead = owned(tmp_path, "session_2026-01-01_1")
    (tmp_path / "session_2026-01-02_2" / "logs").mkdir(parents=True)  # of somebody's plain Ray
    owned(tmp_path, "session_2026-01-03_3", mark)  # its driver is dead, but a process of it still runs
    running = sleeping(mark)
    held = owned(tmp_path, "session_2026-01-04_4")
    (tmp_path / "session_latest").symlink_to(dead)
    with open(held / OWNER_FILE) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_leftovers(tmp_path) == [dead]
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "session_2026-01-02_2", "session_2026-01-03_3", "session_2026-01-04_4"
    ]  # fmt: skip
    running.kill()
    running.wait()
    assert [f.name for f in remove_leftovers(tmp_path)] == ["session_2026-01-04_4", "session_2026-01-03_3"]


def test_an_owner_holds_its_session_until_it_lets_go(tmp_path):
    folder = tmp_path / "session_2026-01-01_1"
    folder.mkdir()
    lock = own(folder, "of nobody")
    assert remove_leftovers(tmp_path) == []
    lock.close()
    assert remove_leftovers(tmp_path) == [folder]


def test_another_run_leaves_a_session_whose_owner_is_about_to_lock_its_file(tmp_path, monkeypatch):
    folder = tmp_path / "session_2026-01-01_1"
    folder.mkdir()
    lock, removed = fcntl.flock, []

    def flock(file, how):
        if how & fcntl.LOCK_EX:
            removed.extend(remove_leftovers(tmp_path))
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with own(folder, "of nobody"):
        assert (removed, [file.name for file in folder.iterdir()]) == ([], [OWNER_FILE])
        assert remove_leftovers(tmp_path) == []


def test_of_the_sessions_that_an_error_names_the_newest_stay(tmp_path):
    names = [f"session_2026-01-0{day}_1" for day in range(1, FAILED_SESSIONS_KEPT + 3)]
    for name in names:
        (tmp_path / name).mkdir()
        keep_failed(tmp_path / name, "of nobody")
    remove_leftovers(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == names[2:]


def test_a_session_goes_with_the_link_to_it_and_a_link_to_another_stays(tmp_path):
    one, two = owned(tmp_path, "session_1"), owned(tmp_path, "session_2")
    latest = tmp_path / "session_latest"
    latest.symlink_to(two)
    remove_session(one)
    assert os.path.lexists(latest)
    remove_session(two)
    assert list(tmp_path.iterdir()) == []


def test_the_sessions_of_a_process_are_those_that_it_started_since_a_time(tmp_path):
    mine = owned(tmp_path, f"session_2026_{os.getpid()}")
    owned(tmp_path, f"session_2026_{os.getpid()}1")
    assert sessions_of(tmp_path, os.getpid(), time.time()) == [mine]
    assert sessions_of(tmp_path, os.getpid(), time.time() + 60) == []
