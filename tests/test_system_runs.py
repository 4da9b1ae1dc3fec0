"""Whole runs from the command line, on the tiny model: resumed, killed, interrupted, starved, submitted, and what is left.

Every run carries a mark in its environment, which all its processes inherit, so that what it leaves running can be found.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.system

APPORTION = str(Path(sys.executable).parent / "apportion")
MARK = "APPORTION_TEST_MARK"
REWARDS = '''
import os, pathlib, signal

calls = singles = 0


def variety(prompts, completions, **columns):
    """How many different characters there are; in its third call it may take a rollout engine with it."""
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_IN_CALL", "0")):
        _kill_rollout_engine()
    return [len(set(text)) / 8 for text in completions]


def _kill_rollout_engine():
    log = str(pathlib.Path(os.environ["APPORTION_LOG"]).with_name("rollout-0.log"))
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\\0")
        except OSError:
            continue
        if f"APPORTION_LOG={log}".encode() in environment:
            os.kill(int(process.name), signal.SIGKILL)


def fragile(prompts, completions, **columns):
    """Two calls a step, one for each engine. Raises for three samples of the first step, and for all of the third."""
    global calls, singles
    if len(completions) > 1:
        calls += 1
    else:
        singles += 1
    if calls >= 5 or (calls == 1 and singles < 4):
        raise LookupError("the answer book is lost")
    return [len(set(text)) / 8 for text in completions]
'''


@dataclass
class Run:
    """A command under way in a session of its own, as a shell would start it."""

    words: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.output_file = self.folder / f"output-{self.mark}.txt"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with open(self.output_file, "wb") as output:
            self.process = subprocess.Popen(
                self.words, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True,
                env=kept | {MARK: self.mark} | self.environment,
            )  # fmt: skip

    def finished(self, seconds: float = 240) -> "Run":
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self.words[1:3]} took more than {seconds} s:\n{self.output}") from None
        return self

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def left_running(self, patience: float = 15) -> list[str]:
        """Command lines of this run's processes that are still there after a while."""
        deadline = time.monotonic() + patience
        while True:
            found = {pid: line for pid, line in _marked(self.mark).items() if pid != self.process.pid}
            if not found or time.monotonic() > deadline:
                return list(found.values())
            time.sleep(0.2)

    def end(self) -> None:
        for pid in _marked(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _marked(mark: str) -> dict[int, str]:
    """Living processes that carry `mark`: pid -> command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if f"{MARK}={mark}".encode() in environment.split(b"\0") and state != "Z":
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        except OSError:
            continue
    return found


def lines_of(run_folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    file = run_folder / name
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def steps_of(run_folder: Path) -> dict[int, dict]:
    return {line["step"]: line for line in lines_of(run_folder) if "policy/loss" in line}


def error_of(run: Run) -> str:
    """The one line that says what went wrong."""
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.output
    return errors[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("runs")
    (made / "rewards.py").write_text(REWARDS)
    return made


@pytest.fixture(scope="module")
def started(folder):
    """Start a run; whatever a test makes of it, it does not outlive this module."""
    runs: list[Run] = []

    def start(*words: str, program: str = APPORTION, **environment: str) -> Run:
        runs.append(Run([program, *words], folder, environment))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


COMMON = [
    "tracking.console=false",
    "tracking.plots=false",
    "data.eval=null",
    "evaluation.before=false",
    "cluster.threads=1",
]
QUICK = [*COMMON, "rollout.engine=transformers", "checkpoint.final=false"]
REPEATED = [
    "train", "experiment=tiny_ppo", *COMMON, "train.deterministic=true", "train.steps=4", "checkpoint.every_steps=2",
    "checkpoint.keep=4", "tracking.samples_per_step=16", "policy.zero_stage=1", "reward.max_failed_share=0",
    "policy.learning_rate=1e-3", "algorithm.updates_per_batch=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def side_by_side(folder, started):
    """Two runs at once: one goes through, the other loses its rollout engine in its third step."""
    words = [*REPEATED, f"reward.functions={folder}/rewards.py:variety", f"runs_folder={folder}/runs"]
    whole = started(*words, "run_name=whole")
    killed = started(*words, "run_name=killed", KILL_IN_CALL="3")
    return whole.finished(), killed.finished()


def test_two_runs_beside_each_other_do_not_collide(side_by_side, folder):
    whole, _ = side_by_side
    assert whole.code == 0, whole.output
    assert sorted(steps_of(folder / "runs/whole")) == [1, 2, 3, 4]
    assert whole.left_running() == []


def test_a_killed_actor_is_named_with_cause_and_last_words_and_nothing_is_left_running(side_by_side, folder):
    _, killed = side_by_side
    assert killed.code == 1
    assert re.match(r"error: rollout-0 \(pid \d+ on \S+\) died in \w+ of step 3 \(\w+\): .*exit", error_of(killed))
    assert f"last lines of {folder}/runs/killed/logs/rollout-0.log" in killed.output
    assert sorted(steps_of(folder / "runs/killed")) == [1, 2]
    assert killed.left_running() == []


def test_two_and_two_steps_equal_four_steps(side_by_side, folder, started):
    """The killed run goes on from its checkpoint of step 2 and ends with the losses, tokens and weights of the whole one."""
    from safetensors.torch import load_file

    one, other = folder / "runs/whole", folder / "runs/killed"
    resumed = started("train", "resume=killed", f"runs_folder={folder}/runs").finished()
    assert resumed.code == 0, resumed.output
    assert "at step 2" in resumed.output
    whole_steps, resumed_steps = steps_of(one), steps_of(other)
    assert sorted(resumed_steps) == [1, 2, 3, 4]
    for step, metrics in whole_steps.items():
        timeless = {k for k in metrics if not k.startswith(("timing/", "perf/", "time"))}
        assert timeless - {"step"} >= {"policy/loss", "critic/loss", "reward/mean", "policy/kl_reference"}
        for name in timeless:
            assert resumed_steps[step][name] == metrics[name], (step, name)
    assert lines_of(other, "samples.jsonl") == lines_of(one, "samples.jsonl")
    assert len(lines_of(one, "samples.jsonl")) == 4 * 16
    file = "checkpoints/step-000004/model/model.safetensors"
    weights, again = load_file(one / file), load_file(other / file)
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    start = load_file(one / "checkpoints/step-000002/model/model.safetensors")
    assert any(not torch.equal(start[name], weight) for name, weight in weights.items())
    assert len({m["policy/loss"] for m in whole_steps.values()}) == 4
    assert resumed.left_running() == []


def small_disk(folder: Path, words: list[str]) -> list[str] | None:
    """`words` where `folder`/disk is a file system of one MiB of their own, or None if this machine allows none."""
    unshare = shutil.which("unshare")
    mounted = f"mkdir -p {folder}/disk && mount -t tmpfs -o size=1m tmpfs {folder}/disk && "
    base = [str(unshare), "--user", "--map-root-user", "--mount", "sh", "-c"]
    if os.getuid() == 0:
        base.remove("--user")
        base.remove("--map-root-user")
    if unshare is None or subprocess.run([*base, mounted + "true"], capture_output=True).returncode:
        return None
    return [*base, mounted + 'exec "$@"', "sh", *words]


@pytest.fixture(scope="module")
def reward_model(folder, tiny):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    target = folder / "judge"
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def starved(folder, started, reward_model):
    """Two more at once. One has two engines, two sharded ranks, adapters, and rewards that fail; the other a reward
    model, a sharded optimiser, and a disk too small for a checkpoint."""
    failing = started(
        "train", "experiment=tiny_grpo", *QUICK, f"reward.functions={folder}/rewards.py:fragile", "train.steps=4",
        "reward.max_failed_share=0.5", "cluster.policy_ranks=2", "cluster.rollout_engines=2", "policy.zero_stage=3",
        "policy.gradient_checkpointing=true", "lora=default", "cluster.weight_transfer=broadcast",
        f"runs_folder={folder}/runs", "run_name=failing",
    )  # fmt: skip
    words = [
        "train", "experiment=tiny_grpo", *QUICK, "checkpoint.final=true", f"reward.functions=model:{reward_model}",
        "train.steps=1", "policy.zero_stage=2", f"runs_folder={folder}/disk",
        "run_name=full",
    ]  # fmt: skip
    wrapped = small_disk(folder, [APPORTION, *words])
    full = started(*wrapped[1:], program=wrapped[0]) if wrapped else None
    return failing.finished(), full and full.finished()


def test_a_reward_that_raises_for_a_few_samples_is_masked_and_counted_and_the_run_goes_on(starved, folder):
    failing, _ = starved
    steps = steps_of(folder / "runs/failing")
    assert sorted(steps) == [1, 2], failing.output
    assert [steps[s]["reward/failed_share"] for s in (1, 2)] == [3 / 16, 0.0]
    assert steps[2]["weights/version"] == 2
    assert steps[2]["policy/grad_norm"] > 0


def test_a_reward_that_raises_for_all_stops_the_run_with_its_traceback(starved):
    failing, _ = starved
    assert failing.code == 1
    assert re.match(r"error: reward: 100% of this step's samples failed, expected at most 50% ", error_of(failing))
    assert "LookupError: the answer book is lost" in failing.output
    assert 'rewards.py", line ' in failing.output
    assert failing.left_running() == []


def test_a_full_disk_is_one_line_and_nothing_is_left_running(starved):
    _, full = starved
    if full is None:
        pytest.skip("this machine allows no small file system of one's own")
    assert full.code == 1, full.output
    assert re.match(r"error: checkpoint of step 1: the disk of \S+ is full: needed .* free \d+ bytes; ", error_of(full))
    assert "Traceback" not in full.output
    assert full.left_running() == []


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
    """A Ray cluster of one node, protected by a token."""

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
        f"--temp-dir={sessions}", "--num-cpus=4", "--object-store-memory=200000000", "--disable-usage-stats", "--block",
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
    words = [APPORTION, "train", "experiment=tiny_grpo", *QUICK, "train.steps=1", f"runs_folder={folder}/runs"]
    job = submitted(started, head, [*words, "run_name=job"])
    stranger = started(*words[1:], "run_name=stranger", f"cluster.address={head.address}")
    deadline = time.monotonic() + 200
    while not steps_of(folder / "runs/endless") and endless.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(endless.process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    return endless.finished(60), job.finished(), stranger.finished(120)


def test_ctrl_c_ends_a_run_with_130_and_nothing_is_left_running(interrupted, folder):
    endless, _, _ = interrupted
    assert steps_of(folder / "runs/endless")
    assert endless.code == 130, endless.output
    assert endless.output.rstrip().endswith("interrupted")
    assert "Traceback" not in endless.output
    assert endless.left_running() == []


def test_a_job_submitted_to_a_protected_cluster_runs_there_and_leaves_the_cluster_up(interrupted, folder, head):
    _, job, _ = interrupted
    assert job.code == 0, job.output
    assert sorted(steps_of(folder / "runs/job")) == [1]
    assert head.process.process.poll() is None
    logs = str(folder / "runs/job/logs")
    deadline = time.monotonic() + 15
    while any(_runs_for(pid, logs) for pid in _marked(head.process.mark)):
        assert time.monotonic() < deadline, "actors of the job are still running"
        time.sleep(0.2)


def _runs_for(pid: int, logs: str) -> bool:
    try:
        return f"APPORTION_LOG={logs}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def test_a_cluster_that_wants_a_token_refuses_a_run_without_it_in_one_line(interrupted, head):
    _, _, stranger = interrupted
    assert stranger.code == 2, stranger.output
    assert error_of(stranger).startswith(f"error: cluster.address: cannot reach {head.address}: ")
