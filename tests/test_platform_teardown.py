"""Real local Rays whose parts die or hang: what is said, what still works, what is left. Only processes that a test has
started get a signal: they are children of the Python that it starts, or its own Ray's."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apportion.platform.session import MARK, end_marked, marked, state_of
from apportion.platform.start import session_folder

pytestmark = pytest.mark.system

DRIVER = '''
"""Starts two actors, breaks something, waits; prints what it saw as JSON lines."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
from apportion.edges import tell, told_first
from apportion.platform import health
from apportion.platform.cluster import ActorRequest, Cluster, gather
from apportion.platform.errors import ApportionError
from apportion.platform.process import ActorBase
from apportion.platform.teardown import leave

health.STOPPED_SECONDS, health.HUNG_SECONDS = 2.0, 2.0
break_what, folder = sys.argv[1], Path(sys.argv[2])


class Part(ActorBase):
    def wait(self, seconds):
        time.sleep(seconds)

    def save(self):
        return "saved"

    def fork_and_leave(self):
        if os.fork() == 0:
            time.sleep(100)
        os._exit(3)


def say(**facts):
    print(json.dumps(facts | {"seconds": time.monotonic() - start}), flush=True)


def run():
    cluster = Cluster(None, "teardown", 1, folder, 0.1)
    import ray

    node = ray._private.worker._global_node
    pids = {name: each[0].process.pid for name, each in node.all_processes.items()}
    try:
        with told_first():
            one, two = cluster.start([ActorRequest(f"part-{i}", Part) for i in range(2)], 60)
            global start
            start = time.monotonic()
            say(session=node.get_session_dir_path(), mark=cluster._remains.mark)
            name, _, number = break_what.partition(" ")
            if name in pids:
                os.kill(pids[name], getattr(signal, number))
            if name == "put":
                os.kill(pids["raylet"], signal.SIGSTOP)
                ray.put(bytes(2_000_000))
            try:
                calls = {"fork": ("fork_and_leave",)}
                gather([one.call(*calls.get(name, ("wait", 100.0)))], 120, "update of step 1")
            except ApportionError as error:
                say(error=type(error).__name__, saved=gather([two.call("save")], 30, "checkpoint"))
                raise
    finally:
        before = time.monotonic()
        cluster.shutdown()
        say(shutdown=time.monotonic() - before)


start = time.monotonic()
try:
    run()
except ApportionError as error:
    tell(error)
    sys.exit(leave(1))
'''


class Driver:
    """A run of DRIVER, with what it printed."""

    def __init__(self, folder: Path, breaks: str) -> None:
        program = folder / "driver.py"
        program.write_text(DRIVER)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != MARK}
        self.process = subprocess.Popen(
            [sys.executable, str(program), breaks, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=folder, env=kept,
        )  # fmt: skip
        first = json.loads(self.process.stdout.readline())
        self.session, self.mark = Path(first["session"]), first["mark"]

    def finished(self, seconds: float = 90) -> "Driver":
        out, self.err = self.process.communicate(timeout=seconds)
        self.said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return self

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def broken(tmp_path):
    drivers: list[Driver] = []

    def start(breaks: str) -> Driver:
        drivers.append(Driver(tmp_path, breaks))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()
        end_marked(driver.mark)


def gone(driver: Driver, seconds: float) -> bool:
    """Nothing of it runs after at most so many seconds."""
    deadline = time.monotonic() + seconds
    while marked(driver.mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not marked(driver.mark)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        ("gcs_server SIGKILL", r"Ray's control server \(GCS\) \(pid \d+\) died"),
        ("raylet SIGSTOP", r"Ray's raylet \(pid \d+\) is stopped"),
    ],
)
def test_a_lost_ray_is_reported_and_torn_down_while_actors_still_answer(broken, breaks, said):
    driver = broken(breaks).finished()
    assert driver.process.returncode == 1, driver.err
    lost, ended = driver.said
    assert (lost["error"], lost["saved"]) == ("ClusterLost", ["saved"]) and lost["seconds"] < 20
    assert ended["shutdown"] < 15
    [error] = driver.errors
    assert re.match(f"error: {said}", error) and f"{driver.session}/logs" in error
    assert gone(driver, 5) and (driver.session / "logs").is_dir()  # which the error names


def test_a_call_into_ray_that_never_returns_does_not_keep_the_process(broken):
    driver = broken("put").finished()
    assert driver.process.returncode == 1, driver.err
    [error] = driver.errors
    assert "raylet" in error and error.endswith("this process hangs in a call into Ray and ends now")
    assert gone(driver, 5)


def test_an_actor_that_dies_while_its_forked_child_lives_is_noticed_and_nothing_is_left(broken):
    driver = broken("fork").finished()
    lost, _ = driver.said
    assert lost["error"] == "ActorError" and lost["seconds"] < 10
    assert driver.errors[0].startswith("error: part-0 (pid ")
    assert gone(driver, 0) and not driver.session.exists()  # Ray itself was well, so nobody needs its logs


def test_a_killed_driver_leaves_no_process_and_no_folder_for_long(broken):
    driver = broken("wait")
    assert len(marked(driver.mark)) > 5  # the mark finds all of Ray's processes
    driver.process.kill()
    deadline = time.monotonic() + 15
    while driver.session.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not driver.session.exists() and gone(driver, 0)


def test_an_interrupted_start_leaves_no_process_and_no_folder(tmp_path):
    """Ctrl-C in the middle of Ray's start, before there is an actor or a session that could be named."""
    mark = secrets.token_hex(8)
    program = tmp_path / "start.py"
    program.write_text(
        "import secrets, sys\nfrom pathlib import Path\nfrom apportion.platform.cluster import Cluster\n"
        f"made = secrets.token_hex\nsecrets.token_hex = lambda count: {mark!r} if count == 8 else made(count)\n"
        "Cluster(None, 'start', 1, Path(sys.argv[1]), 0.1)\n"
    )
    driver = subprocess.Popen([sys.executable, str(program), str(tmp_path)], stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while len(marked(mark)) < 2:
            assert time.monotonic() < deadline and state_of(driver.pid) not in "XZ"
            time.sleep(0.05)
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=60)
        assert err.decode().rstrip().endswith("KeyboardInterrupt")
        assert marked(mark) == []
        assert list(session_folder(os.environ).glob(f"session_*_{driver.pid}")) == []
    finally:
        driver.kill()
        end_marked(mark)
