"""The order in which actors are launched, set up and waited for: on a shared GPU, on whole GPUs and on CPUs."""

from types import SimpleNamespace

import pytest

from apportion.assembly import starting
from apportion.assembly.order import waves
from apportion.assembly.starting import start
from apportion.cli import compose_config, to_config
from apportion.platform.cluster import ActorRequest


class Recorder:
    """A cluster of fake actors. `log` has what was asked of whom, in order."""

    joined = False

    def __init__(self):
        self.log = []

    def expect(self, requests):
        """What a real one compares with the nodes of a joined cluster."""

    def launch(self, requests):
        self.log += [f"launch {request.name}" for request in requests]
        return [_Fake(request.name, self.log) for request in requests]

    def ready(self, actors, timeout_seconds, joining=()):
        assert timeout_seconds == 77.0
        waited = [actor.name for actor in actors] + [f"{name}.{method}" for name, method in joining]
        self.log.append(f"wait {' '.join(waited)}")


class _Fake:
    def __init__(self, name, log):
        self.name, self._log = name, log

    def call(self, method, *arguments):
        self._log.append(f"{self.name}.{method}")
        return (self.name, method)


def started(monkeypatch, gpus, *overrides):
    """What `start` does with actors that have so many GPUs, by role, a list for each."""
    config, _ = to_config(compose_config(["experiment=tiny_ppo", "cluster.start_timeout_seconds=77", *overrides]))
    requests = {
        role: [ActorRequest(f"{role}-{i}", SimpleNamespace, gpus=each) for i, each in enumerate(several)]
        for role, several in gpus.items()
    }
    cluster = Recorder()
    monkeypatch.setattr(starting, "gather", lambda calls, seconds, what: [("127.0.0.1", 29500)])
    actors = start(config, cluster, requests)
    assert {role: [a.name for a in getattr(actors, role)] for role in gpus if role != "credit"} == {
        role: [request.name for request in asked] for role, asked in requests.items() if role != "credit"
    }
    assert actors.credit.name == "credit-0"
    return cluster.log


ALL_ROLES = {"rollout": [0], "reward": [0], "credit": [0], "policy": [0], "reference": [0], "critic": [0]}
AT_ONCE = [
    "launch rollout-0",
    "launch reward-0",
    "launch credit-0",
    "launch policy-0",
    "launch reference-0",
    "launch critic-0",
    "policy-0.free_port",
    "policy-0.setup",
    "critic-0.free_port",
    "critic-0.setup",
    "credit-0.prepare",
    "wait rollout-0 reward-0 credit-0 policy-0 reference-0 critic-0 policy-0.setup critic-0.setup credit-0.prepare",
]


@pytest.mark.parametrize("share", [0, 1, 2])
def test_without_a_shared_gpu_everything_starts_at_once(monkeypatch, capsys, share):
    gpus = {role: [0 if role == "credit" else share] for role in ALL_ROLES}
    assert started(monkeypatch, gpus) == AT_ONCE
    assert capsys.readouterr().out == ""


def test_an_engine_on_a_shared_gpu_is_whole_before_anything_else_loads_there(monkeypatch, capsys):
    gpus = {role: [0 if role in ("credit", "reward") else 0.25] for role in ALL_ROLES}
    assert started(monkeypatch, gpus) == [
        "launch rollout-0",
        "launch reward-0",
        "launch credit-0",
        "launch policy-0",
        "launch critic-0",
        "wait rollout-0 reward-0 credit-0 policy-0 critic-0",
        "launch reference-0",
        "policy-0.free_port",
        "policy-0.setup",
        "critic-0.free_port",
        "critic-0.setup",
        "credit-0.prepare",
        "wait reference-0 policy-0.setup critic-0.setup credit-0.prepare",
    ]
    assert capsys.readouterr().out == "engines first: they share a GPU\n"


def test_engines_that_could_be_on_one_gpu_start_one_after_the_other(monkeypatch):
    gpus = {"rollout": [0.3, 0.3], "reward": [0.1], "credit": [0], "policy": [0.2], "judge": [0.2]}
    log = started(monkeypatch, gpus)
    assert [line for line in log if line.startswith(("launch", "wait"))] == [
        "launch rollout-0",
        "launch credit-0",
        "launch policy-0",
        "wait rollout-0 credit-0 policy-0",
        "launch rollout-1",
        "wait rollout-1",
        "launch judge-0",
        "wait judge-0",
        "launch reward-0",
        "wait reward-0 policy-0.setup credit-0.prepare",
    ]
    assert log.index("wait judge-0") < log.index("policy-0.setup")


def test_an_evaluation_orders_its_engines_likewise(monkeypatch):
    log = started(monkeypatch, {"rollout": [0.5, 0.5], "reward": [0], "credit": [0], "environment": []})
    assert log == [
        "launch rollout-0",
        "launch reward-0",
        "launch credit-0",
        "wait rollout-0 reward-0 credit-0",
        "launch rollout-1",
        "credit-0.prepare",
        "wait rollout-1 credit-0.prepare",
    ]


def test_environments_and_engines_meet_when_all_engines_are_there(monkeypatch):
    log = started(monkeypatch, {"rollout": [0.5, 0.5], "reward": [0], "credit": [0], "environment": [0]})
    assert log[-4:] == [
        "rollout-0.connect",
        "rollout-1.connect",
        "credit-0.prepare",
        "wait rollout-1 rollout-0.connect rollout-1.connect credit-0.prepare",
    ]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        # Nobody has room beside the engine: its GPU is its own.
        ({"rollout": [0.8], "policy": [0.5]}, [["rollout-0", "policy-0"]]),
        # Whole GPUs of ranks are not those of fractional engines, which share one.
        ({"rollout": [0.5, 0.5], "policy": [1, 1]}, [["rollout-0", "policy-0", "policy-1"], ["rollout-1"]]),
        # The judge has no room beside either engine, so it need not wait for them.
        ({"rollout": [0.5, 0.5], "judge": [0.6]}, [["rollout-0", "judge-0"], ["rollout-1"]]),
        # A role waits as a whole.
        ({"rollout": [0.5], "reward": [0.5, 0]}, [["rollout-0"], ["reward-0", "reward-1"]]),
        ({"rollout": [0.5], "reward": [0], "judge": []}, [["rollout-0", "reward-0"]]),
        # Shares that add up to one GPU but for rounding.
        ({"rollout": [0.7], "policy": [0.3]}, [["rollout-0"], ["policy-0"]]),
    ],
)
def test_who_waits_for_whom(gpus, expected):
    assert [[f"{role}-{i}" for role, i in wave] for wave in waves(gpus)] == expected
