"""Device memory of each role in metrics and summary: only where actors have GPUs."""

import sys
from types import SimpleNamespace

import pytest
import torch

from apportion.actors.engines.vllm_engine import VllmEngine
from apportion.actors.engines.vllm_worker import WeightReceiver
from apportion.actors.judge import JudgeWorker
from apportion.actors.judge_client import ModelJudge
from apportion.actors.rollout import RolloutWorker
from apportion.assembly.report import device_summary, print_device_memory
from apportion.loop import device_memory as loop_memory
from apportion.loop.device_memory import DevicePeaks
from apportion.platform.cluster import Actor, Cluster
from apportion.platform.device_memory import DeviceMemory, device_memory
from apportion.platform.metric_names import unknown_metrics
from apportion.platform.process import ActorBase

GIB = 2**30


@pytest.fixture
def cuda(monkeypatch):
    """A process on a GPU of 80 GiB, 30 of them free. Holds what was called."""
    called = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 12 * GIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * GIB, 80 * GIB))
    return called


def test_a_process_on_a_gpu_says_its_peak_and_the_devices_use(cuda):
    assert ActorBase().device_memory() == DeviceMemory(peak=12 * GIB, used=50 * GIB)
    assert cuda == ["reset"]  # the next peak is of the time from now on


def test_a_process_without_cuda_has_no_number_and_starts_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("_lazy_init", "max_memory_reserved", "reset_peak_memory_stats", "mem_get_info", "is_available"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was asked"))
    assert ActorBase().device_memory() is None


def test_torch_is_not_imported_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert device_memory() is None
    assert "torch" not in sys.modules


def engine(answers):
    """A vLLM engine whose workers, processes of their own, answer so."""
    made = object.__new__(VllmEngine)
    made._llm = SimpleNamespace(collective_rpc=lambda name: answers if name == "apportion_device_memory" else None)
    return made


def test_an_engine_asks_its_workers(cuda):
    assert WeightReceiver().apportion_device_memory() == (12 * GIB, 50 * GIB)
    worker = object.__new__(RolloutWorker)
    worker._engine = engine([(3, 10), (5, 8)])
    assert worker.device_memory() == DeviceMemory(5, 10)
    worker._engine = engine([None, None])
    assert worker.device_memory() is None


def test_a_judge_asks_its_engine_or_itself(cuda):
    worker, source = object.__new__(JudgeWorker), object.__new__(ModelJudge)
    source.engine, worker._source = engine([(3, 10)]), source
    assert worker.device_memory() == DeviceMemory(3, 10)
    worker._source = None  # a function of the user's
    assert worker.device_memory() == DeviceMemory(12 * GIB, 50 * GIB)


class Fake(Actor):
    """An actor with these answers, one a step."""

    def __init__(self, name, *answers):
        super().__init__(name, None, "", gpus=0.5)
        self.answers = list(answers)

    def call(self, method, *arguments, returns=1):
        assert method == "device_memory"
        return self.answers.pop(0)


@pytest.fixture
def gathered(monkeypatch):
    """What was waited for, and how long at most."""
    asked = []

    def gather(calls, seconds, what):
        asked.append((len(calls), seconds, what))
        return calls

    monkeypatch.setattr(loop_memory, "gather", gather)
    return asked


def test_all_actors_are_asked_in_one_round_and_a_roles_largest_counts(gathered):
    of = DeviceMemory
    actors = [
        Fake("policy-0", of(4 * GIB, 9 * GIB), of(2 * GIB, 9 * GIB)),
        Fake("policy-1", of(5 * GIB, 11 * GIB), of(3 * GIB, 10 * GIB)),
        Fake("rollout-0", of(6 * GIB, 9 * GIB), of(7 * GIB, 9 * GIB)),
        Fake("reward-0", None, None),  # a function that uses no GPU in this process
    ]
    peaks = DevicePeaks(actors, 99.0)
    assert peaks.measure() == {"gpu/policy_gib": 5.0, "gpu/rollout_gib": 6.0, "gpu/used_gib": 11.0}
    second = peaks.measure()
    assert second == {"gpu/policy_gib": 3.0, "gpu/rollout_gib": 7.0, "gpu/used_gib": 10.0}
    assert peaks.mib == {"policy-0": 4096.0, "policy-1": 5120.0, "rollout-0": 7168.0}
    assert gathered == [(4, 99.0, "GPU memory")] * 2
    assert unknown_metrics(second) == []


def test_the_summary_has_the_time_after_the_last_step_too(gathered, capsys):
    peaks = DevicePeaks([Fake("policy-0", DeviceMemory(GIB, GIB), DeviceMemory(2 * GIB, GIB))], 1.0)
    peaks.measure()
    summary = device_summary(peaks)
    assert summary == {"peak_device_memory_mib": {"policy-0": 2048.0}}
    print_device_memory(summary)
    assert capsys.readouterr().out == "most GPU memory of each actor: policy-0 2.0 GiB\n"


def test_without_gpus_nothing_is_asked_or_said(gathered, capsys):
    peaks = DevicePeaks()
    assert (peaks.measure(), device_summary(peaks), gathered) == ({}, {}, [])
    print_device_memory({})
    assert capsys.readouterr().out == ""


def test_a_cluster_names_the_actors_that_have_a_gpu():
    cluster = object.__new__(Cluster)
    cluster._actors = [Actor("policy-0", None, "", gpus=0.5), Actor("credit-0", None, ""), Fake("judge-0")]
    assert [actor.name for actor in cluster.on_gpus()] == ["policy-0", "judge-0"]
