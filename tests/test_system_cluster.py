"""Runs from the command line that are interrupted, submitted to a Ray cluster, or refused by it."""

import os
import secrets
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from run_commands import APPORTION, COMMON, QUICK, Run, error_of, marked, starting, steps_of

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def started(folder):
    with starting(folder) as start:
        yield start


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


@dataclass
class Head:
    """A Ray cluster of one node with two GPUs by its own account, protected by a token."""

    process: Run
    address: str
    dashboard: str
    token: dict[str, str]


@pytest.fixture(scope="module")
def head(folder, started):
    gcs, dashboard, agent, client = free_ports(4)
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    protected = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    sessions = Path("/tmp") / f"apr-{secrets.token_hex(3)}"  # sockets' names have to be short
    process = started(
        "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--temp-dir={sessions}", "--num-cpus=4", "--num-gpus=2", "--object-store-memory=200000000", "--disable-usage-stats", "--block",
        program=str(Path(sys.executable).parent / "ray"), **protected,
    )  # fmt: skip
    yield Head(process, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", protected)
    process.end()
    shutil.rmtree(sessions, ignore_errors=True)


def submitted(started, head: Head, words: list[str]) -> Run:
    """`ray job submit`, tried until the cluster is up."""
    ray = str(Path(sys.executable).parent / "ray")
    deadline = time.monotonic() + 90
    while True:
        job = started("job", "submit", "--address", head.dashboard, "--", *words, program=ray, **head.token)
        while job.process.poll() is None and "submitted successfully" not in job.output:
            time.sleep(0.3)
        if "submitted successfully" in job.output:
            return job
        assert time.monotonic() < deadline and head.process.process.poll() is None, job.output + head.process.output
        time.sleep(1)


@pytest.fixture(scope="module")
def interrupted(folder, started, head):
    """Ctrl-C in the middle of a run with vLLM; beside it a job submitted to a cluster, and one that may not join it."""
    endless = started(
        "train", "experiment=tiny_grpo", *COMMON, "train.steps=100000", "cluster.weight_transfer=broadcast",
        f"runs_folder={folder}/runs", "run_name=endless",
    )  # fmt: skip
    killed = started(
        "train", "experiment=tiny_grpo", *QUICK, "train.steps=100000", f"runs_folder={folder}/runs", "run_name=killed"
    )
    words = [APPORTION, "train", "experiment=tiny_grpo", *QUICK, "train.steps=1", f"runs_folder={folder}/runs"]
    job = submitted(started, head, [*words, "run_name=job"])
    stranger = started(*words[1:], "run_name=stranger", f"cluster.address={head.address}")
    deadline = time.monotonic() + 200
    for run, name in ((endless, "endless"), (killed, "killed")):
        while not steps_of(folder / "runs" / name) and run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    os.killpg(endless.process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    killed.process.terminate()  # as a scheduler does, to the process alone
    return endless.finished(60), job.finished(), stranger.finished(120), killed.finished(60)


def test_ctrl_c_ends_a_run_with_130_and_nothing_is_left_running(interrupted, folder):
    endless, *_ = interrupted
    assert steps_of(folder / "runs/endless")
    assert endless.code == 130, endless.output
    assert endless.output.rstrip().endswith("interrupted")
    assert "Traceback" not in endless.output
    assert endless.left_running() == []


def test_a_polite_kill_ends_a_run_as_ctrl_c_does(interrupted, folder):
    *_, killed = interrupted
    assert steps_of(folder / "runs/killed")
    assert killed.code == 130, killed.output
    assert killed.output.rstrip().endswith("interrupted")
    assert killed.left_running() == []


def test_a_job_submitted_to_a_protected_cluster_runs_there_and_leaves_the_cluster_up(interrupted, folder, head):
    _, job, *_ = interrupted
    assert job.code == 0, job.output
    assert sorted(steps_of(folder / "runs/job")) == [1]
    assert head.process.process.poll() is None
    logs = str(folder / "runs/job/logs")
    deadline = time.monotonic() + 15
    while any(_runs_for(pid, logs) for pid in marked(head.process.mark)):
        assert time.monotonic() < deadline, "actors of the job are still running"
        time.sleep(0.2)


def _runs_for(pid: int, logs: str) -> bool:
    try:
        return f"APPORTION_LOG={logs}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def test_a_cluster_that_wants_a_token_refuses_a_run_without_it_in_one_line(interrupted, head):
    _, _, stranger, _ = interrupted
    assert stranger.code == 2, stranger.output
    assert error_of(stranger).startswith(f"error: cluster.address: cannot reach {head.address}: ")


def test_a_run_that_asks_a_cluster_for_more_gpus_than_it_has_says_so_at_once_and_when_it_gives_up(
    interrupted, started, folder, head
):
    asking = started(
        "train", "experiment=tiny_grpo", *QUICK, "train.steps=1", "train.prompts_per_step=3", "cluster.policy_ranks=3",
        "cluster.gpus_per_policy_rank=1", "cluster.gpus_per_rollout_engine=1", "cluster.start_timeout_seconds=5",
        f"runs_folder={folder}/runs", "run_name=asking", f"cluster.address={head.address}", **head.token,
    ).finished(120)  # fmt: skip
    lacking = "the actors ask for 4 GPUs, and the cluster has 2"
    assert asking.code == 1, asking.output
    assert f"warning: {lacking}: the start waits for more nodes, up to cluster.start_timeout_seconds" in asking.output
    line = error_of(asking)
    assert line.startswith("error: start of actors: no answer within 5 s from ")
    assert line.endswith(f": {lacking}; lower cluster.gpus_per_*, or add nodes")
    assert head.process.process.poll() is None
