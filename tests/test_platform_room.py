"""What a joined cluster has, against what a run asks it for, and the threads that its actors get."""

from types import SimpleNamespace

import pytest

from apportion.assembly import hosts
from apportion.assembly.hosts import thread_count
from apportion.conf.machine import Machine
from apportion.conf.schema import ClusterConfig
from apportion.platform import cluster, room
from apportion.platform.cluster import STARTING, Actor, ActorRequest, Call, Cluster
from apportion.platform.progress import Clocks
from apportion.platform.room import Node, asked, shortage, smallest

NODES = [Node(0, 0), Node(64, 0), Node(32, 8), Node(16, 2)]  # a head without cores, as KubeRay's


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.setattr(asked, "gpus", [])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("gpus", "lacking"),
    [
        ([0, 0], None),
        ([1] * 10, None),
        ([8, 0.5, 1.5], None),
        ([9], "an actor asks for 9 GPUs, and no node of the cluster has more than 8"),
        ([1] * 11, "the actors ask for 11 GPUs, and the cluster has 10"),
        ([8, 2, 0.5], "the actors ask for 10.5 GPUs, and the cluster has 10"),
    ],
)
def test_the_largest_actor_is_held_against_the_largest_node_and_the_sum_against_all(gpus, lacking):
    assert shortage(NODES, gpus) == lacking


def test_no_nodes_and_one_gpu():
    assert shortage([], [1]) == "an actor asks for 1 GPU, and no node of the cluster has more than 0"
    assert room.alive_nodes() == []  # no cluster is joined


def test_the_smallest_node_that_has_the_gpus_counts():
    assert [smallest(NODES, gpus) for gpus in (0, 1, 4)] == [Node(16, 2), Node(16, 2), Node(32, 8)]
    assert smallest(NODES, 9) is None and smallest([], 0) is None


def test_threads_are_the_share_of_the_cores_that_an_actors_gpus_are(monkeypatch):
    monkeypatch.setattr(hosts.machine, "this_machine", lambda: Machine(96, 2**37, 8))
    here = ClusterConfig()
    assert [thread_count(here, gpus) for gpus in (0, 0.5, 1, 4)] == [96, 6, 12, 48]
    assert thread_count(ClusterConfig(threads=7), 1) == 7
    joined = ClusterConfig(address="10.0.0.1:6379")
    assert thread_count(joined, 1) == 12  # not joined yet
    monkeypatch.setattr(room, "alive_nodes", lambda: NODES)
    assert [thread_count(joined, gpus) for gpus in (0, 0.5, 1, 4)] == [16, 4, 8, 16]
    assert thread_count(ClusterConfig(threads=7, address="10.0.0.1:6379"), 1) == 7
    assert thread_count(here, 1) == 12
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert thread_count(here, 1) == 8


def test_without_a_gpu_threads_are_the_cores_of_this_process():
    import os

    assert thread_count(ClusterConfig()) <= len(os.sched_getaffinity(0))


LACKING = "the actors ask for 11 GPUs, and the cluster has 10"


def test_a_cluster_that_lacks_gpus_is_told_at_once_and_when_the_start_is_late(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("APPORTION_LOG", raising=False)
    monkeypatch.setattr(room, "alive_nodes", lambda: NODES)
    requests = [ActorRequest(f"policy-{i}", object, gpus=1) for i in range(11)]

    def expect(joined, requests):
        Cluster.expect(SimpleNamespace(joined=joined), requests)
        return capsys.readouterr().err

    assert expect(True, requests) == (
        f"warning: {LACKING}: the start waits for more nodes, up to cluster.start_timeout_seconds\n"
    )
    late = [Call(Actor("policy-9", None, str(tmp_path / "none.log")), "describe", [])]
    assert cluster._late(late, Clocks([""], 600), 600, STARTING) == (
        f"start of actors: no answer within 600 s from policy-9 (describe): {LACKING}; lower cluster.gpus_per_*, or add nodes"
    )
    assert "raise cluster.call_timeout_seconds if it is only slow" in cluster._late(
        late, Clocks([""], 600), 600, "update of step 3"
    )
    assert expect(True, requests[:10]) == ""
    assert "raise cluster.start_timeout_seconds if it is only slow" in cluster._late(
        late, Clocks([""], 600), 600, STARTING
    )
    assert expect(False, requests) == "" and asked.gpus == []  # a Ray of the run's own was planned for
    monkeypatch.setattr(room, "alive_nodes", lambda: [*NODES, Node(16, 1)])  # an autoscaler has added it
    assert expect(True, requests) == ""
