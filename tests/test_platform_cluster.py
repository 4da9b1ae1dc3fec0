"""Waiting for actors: who is late, who died and why. On a real, embedded Ray, and without any."""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from apportion.platform.cluster import Actor, ActorRequest, Call, Cluster, gather, module_folders, python_path
from apportion.platform.cuda import Driver, Gpu
from apportion.platform.errors import ActorError, ApportionError, CheckpointError, ConfigError, RewardError
from apportion.platform.process import (
    ActorBase,
    find_environment_programs,
    find_user_modules,
    tail,
    working_folder_last,
)
from apportion.platform.session import marked


class Patient(ActorBase):
    """Does what is asked of it, in the worst way."""

    def __init__(self, broken: str = "") -> None:
        if broken:
            print("about to fail", flush=True)
            raise ValueError(broken)

    def wait(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self, kind: str) -> None:
        errors = {
            "reward": RewardError("reward: got none"),
            "disk": OSError(28, "No space left on device"),
            "other": KeyError("missing_thing"),
        }
        raise errors[kind]

    def die(self, how: str = "kill") -> None:
        print("the last words", flush=True)
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGSEGV if how == "segfault" else signal.SIGKILL)

    def imports(self, name: str) -> str:
        return str(importlib.import_module(name).__file__)

    def unsafe_path(self) -> tuple[str | None, int]:
        """What programs of the user's are started with, and how this process was."""
        return os.environ.get("PYTHONSAFEPATH"), sys.flags.safe_path

    def programs(self) -> str:
        return os.environ["PATH"].split(os.pathsep)[0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    joined = Cluster(None, "waiting", 1, tmp_path_factory.mktemp("logs"), 0.1)
    yield joined
    joined.shutdown()


@pytest.mark.parametrize(
    ("driver", "gpus"),
    [
        (Driver((Gpu("A100", 2**36, (8, 0)),) * 2, (13, 0)), {"num_gpus": 2}),
        (Driver((), (13, 0)), {"num_gpus": 0}),
        (Driver(problem="the CUDA driver crashes (signal 11)"), {"num_gpus": 0}),
        (Driver(installed=False), {}),
    ],
)
def test_a_ray_of_the_runs_own_counts_the_gpus_that_the_plan_counted(driver, gpus, monkeypatch, tmp_path):
    import ray

    given = {}
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr("apportion.platform.cluster.cuda.driver", lambda: driver)
    Cluster._connect(SimpleNamespace(), None, "run", 1, 0.1, tmp_path)
    assert {name: value for name, value in given.items() if name == "num_gpus"} == gpus
    assert given["address"] == "local"


@pytest.fixture(scope="module")
def actors(cluster):
    return cluster.start([ActorRequest(f"patient-{i}", Patient) for i in range(2)], 60)


@pytest.mark.system
def test_results_come_in_the_order_of_the_calls(actors):
    assert gather([actors[0].call("wait", 0.2), actors[1].call("wait", 0.0)], 30, "a test") == [0.2, 0.0]


def listening(pids: list[int]) -> dict[str, str]:
    """Addresses as the kernel writes them on which these processes listen, by the socket."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {words[9]: words[1].split(":")[0] for words in lines if words[3] == "0A" and words[9] in sockets}


@pytest.mark.system
def test_a_ray_of_the_runs_own_listens_on_loopback_alone(cluster, actors):
    import ray

    found = listening([os.getpid(), *marked(cluster._remains.mark)])
    assert len(found) >= 6  # of the GCS, the raylet, its agents, this process and both actors
    assert set(found.values()) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray._private.ray_constants.ENABLE_RAY_CLUSTER  # a cluster that is joined later has to reach this process


@pytest.mark.system
def test_a_deadline_names_the_actor_that_is_late_and_not_the_others(actors):
    calls = [actors[0].call("wait", 0.0), actors[1].call("wait", 4.0)]
    with pytest.raises(
        ActorError, match=r"^update of step 3: no answer within 1 s from patient-1 \(pid \d+ on .*\) \(wait\); "
    ):
        gather(calls, 1.0, "update of step 3")


@pytest.mark.system
def test_a_projects_own_error_arrives_as_itself(actors):
    with pytest.raises(RewardError, match=r"^reward: got none$"):
        gather([actors[0].call("fail", "reward")], 30, "a test")


@pytest.mark.system
def test_a_full_disk_is_said_in_one_line(actors):
    with pytest.raises(CheckpointError, match=r"^patient-0: no space left on the device while in checkpoint of step 2"):
        gather([actors[0].call("fail", "disk")], 30, "checkpoint of step 2")


@pytest.mark.system
def test_another_error_names_actor_method_and_place(actors):
    with pytest.raises(ActorError) as caught:
        gather([actors[0].call("fail", "other")], 30, "a test")
    first, *rest = str(caught.value).splitlines()
    assert first == "patient-0: fail failed in a test: KeyError: 'missing_thing'"
    assert any("raise errors[kind]" in line or "in fail" in line for line in rest)


@pytest.mark.system
def test_an_actor_finds_the_programs_of_its_own_environment(actors):
    assert gather([actors[0].call("programs")], 30, "a test") == [os.path.dirname(sys.executable)]


@pytest.mark.system
def test_a_users_module_is_imported_and_hides_nothing_that_is_installed(cluster, tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("")
    (tmp_path / "datasets").mkdir()
    for file in ("numpy.py", "tokenizers.py", "statistics.py", "queue.py", "datasets/__init__.py"):
        (tmp_path / file).write_text("raise RuntimeError('a file of the user')")
    monkeypatch.chdir(tmp_path)
    [actor] = cluster.start([ActorRequest("importing-0", Patient)], 60)
    names = ["mine_alone", "numpy", "tokenizers", "statistics", "queue", "datasets"]
    mine, *installed = gather([actor.call("imports", name) for name in names], 60, "a test")
    assert mine == str(tmp_path / "mine_alone.py")
    assert [file for file in installed if file.startswith(str(tmp_path))] == []
    assert gather([actor.call("unsafe_path")], 60, "a test") == [(None, True)]


@pytest.mark.system
def test_workers_do_not_see_the_working_folder_before_what_is_installed(tmp_path):
    """Of a Ray that was started in that folder, as by a run."""
    program = tmp_path / "program.py"
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError('a file of the user')")
    (tmp_path / "code").mkdir()  # a worker has the folder of its class first
    (tmp_path / "code" / "patient.py").write_text(
        "import importlib\n"
        "from apportion.platform.process import ActorBase\n"
        "class Patient(ActorBase):\n"
        "    def imports(self, name):\n"
        "        return importlib.import_module(name).__file__\n"
    )
    program.write_text(
        "import sys\n"
        "sys.path.remove(sys.path[0])\n"
        f"sys.path.append({str(tmp_path / 'code')!r})\n"
        "from pathlib import Path\n"
        "from apportion.platform.cluster import ActorRequest, Cluster, gather\n"
        "from patient import Patient\n"
        "cluster = Cluster(None, 'folders', 1, Path('logs'), 0.1)\n"
        "[actor] = cluster.start([ActorRequest('a', Patient)], 60)\n"
        "print(gather([actor.call('imports', 'tokenizers')], 60, 'a test')[0])\n"
        "cluster.shutdown()\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    long = tmp_path / ("a_folder_of_a_job_scheduler_" * 3)
    long.mkdir()
    environment = os.environ | {"PYTHONPATH": root, "TMPDIR": str(long), "HOME": "/proc/nobody"}
    ended = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.strip().endswith("site-packages/tokenizers/__init__.py"), ended.stderr


def known_exit_statuses() -> bool:
    """Whether this kernel tells the exit status of a process that is not a child (Linux 6.15 and later)."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return release is not None and (int(release[1]), int(release[2])) >= (6, 15)


@pytest.mark.system
@pytest.mark.parametrize(
    ("how", "known"), [("kill", "killed by SIGKILL"), ("exit", "exited with code 3"), ("segfault", "killed by SIGSEGV")]
)
def test_a_dead_actor_is_named_with_its_exit_status_and_last_words(cluster, how, known):
    [victim] = cluster.start([ActorRequest(f"victim-{how}", Patient)], 60)
    with pytest.raises(ActorError) as caught:
        gather([victim.call("die", how)], 30, "rollout of step 1")
    message = str(caught.value)
    cause = known if known_exit_statuses() else "its process ended without an exit code"
    place = re.escape(f"victim-{how} (pid {victim.info.pid} on {victim.info.host}) died in rollout of step 1 (die): ")
    assert re.match(place + cause, message), message
    assert "out of memory" not in message and "OOM" not in message
    assert how == "segfault" or message.splitlines()[-1].strip() == "the last words"  # after which Ray dumps its stack


@pytest.mark.system
def test_an_interrupt_that_a_call_raises_is_told_as_one(actors):
    with pytest.raises(ActorError, match=r"^patient-0: die raised KeyboardInterrupt in a test\n"):
        gather([actors[0].call("die", "interrupt")], 30, "a test")


@pytest.mark.system
def test_an_actor_that_cannot_be_made_says_why_in_its_first_line(cluster):
    with pytest.raises(ActorError) as caught:
        cluster.start([ActorRequest("broken-0", Patient, ("got 3, expected 4",))], 60)
    first = str(caught.value).splitlines()[0]
    assert first == "broken-0: could not be made in start of actors: ValueError: got 3, expected 4"
    assert "about to fail" in str(caught.value)


@pytest.mark.system
def test_a_cluster_that_cannot_be_reached_is_refused_in_one_line(cluster, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^cluster\.address: cannot reach 127\.0\.0\.1:1: "):
        Cluster("127.0.0.1:1", "nowhere", 1, tmp_path, None)


def test_a_ray_that_does_not_start_is_said_in_one_line(tmp_path, monkeypatch):
    import ray

    def late(**options):
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ApportionError, match="Ray did not start on this machine: The current node timed out") as error:
        Cluster(None, "late", 1, tmp_path, 0.1)
    assert "\n" not in str(error.value)


def test_the_environments_folder_comes_first_on_the_path_once(monkeypatch):
    monkeypatch.setenv("PATH", "/bin")
    find_environment_programs()
    find_environment_programs()
    assert os.environ["PATH"] == f"{os.path.dirname(sys.executable)}{os.pathsep}/bin"


def test_folders_of_the_users_modules_come_last_on_an_actors_path_once(tmp_path, monkeypatch):
    installed = next(p for p in sys.path if p.endswith("site-packages"))
    monkeypatch.setattr(sys, "path", ["/mine/scripts", *sys.path, "/mine/modules"])
    monkeypatch.chdir(tmp_path)
    folders = module_folders().split(os.pathsep)
    assert folders[0] == "/mine/scripts" and folders[-2:] == ["/mine/modules", str(tmp_path)]
    assert installed not in folders
    monkeypatch.setenv("APPORTION_MODULES", os.pathsep.join(["/mine/scripts", installed, "/mine/more"]))
    before = list(sys.path)
    find_user_modules()
    find_user_modules()
    assert sys.path == [*before, "/mine/more"]


def test_the_working_folder_comes_last_unless_pythonpath_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/given")  # the empty entry is the working folder, too
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/given", "/installed"])
    working_folder_last()
    working_folder_last()
    assert sys.path == ["/given", "/installed", str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", ".")
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/installed"])
    working_folder_last()
    assert sys.path == [str(tmp_path), "/installed"]


@pytest.mark.slow
def test_files_of_the_working_folder_hide_nothing_from_the_command(tmp_path):
    (tmp_path / "datasets").mkdir()
    for name in ("yaml.py", "queue.py", "statistics.py", "omegaconf.py", "datasets/__init__.py"):
        (tmp_path / name).write_text("raise RuntimeError('a file of the user')")
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
    ended = subprocess.run(
        [sys.executable, "-m", "apportion", "plan", "experiment=tiny_grpo"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0 and "a file of the user" not in ended.stderr, ended.stderr


def test_only_what_an_actors_class_needs_goes_before_what_is_installed(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/given")
    assert python_path(Patient) == os.pathsep.join([os.path.dirname(__file__), "/given"])
    assert python_path(dict) == python_path(pytest.Item) == "/given"


def test_the_last_lines_of_a_log_are_read_from_its_end(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {i}\n" for i in range(5000)))
    assert tail(str(log), 2) == "line 4998\nline 4999"
    assert tail(str(tmp_path / "none.log")) == ""


def test_a_call_is_awaited_by_its_first_reference():
    call = Call(Actor("a", None, ""), "m", ["first", "second"])
    assert call.ref == "first"
