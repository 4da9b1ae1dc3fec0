"""What a run has for itself: cores and memory within a container's limits, and machines that are only described."""

import os

import pytest

from apportion.cli import main
from apportion.conf import machine
from apportion.conf.machine import GIB, described, take_described, threads_of, usable_cores, usable_memory
from apportion.platform.cuda import Driver, Gpu
from apportion.platform.errors import ConfigError


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000\n", 8), ("350000 100000\n", 3), ("50000 100000\n", 1), ("1600000 100000\n", 8)]
)
def test_cores_are_within_the_quota_of_the_container(eight_cores, tmp_path, limit, cores):
    write(tmp_path / "cpu.max", limit)
    assert usable_cores(tmp_path, "0::/\n") == cores


def test_the_quota_of_every_cgroup_above_the_process_counts(eight_cores, tmp_path):
    write(tmp_path / "jobs/a/cpu.max", "max 100000\n")
    assert usable_cores(tmp_path, "0::/jobs/a/task\n") == 8
    write(tmp_path / "jobs/cpu.max", "400000 100000\n")
    assert usable_cores(tmp_path, "0::/jobs/a/task\n") == 4
    write(tmp_path / "jobs/a/task/cpu.max", "200000 100000\n")
    assert usable_cores(tmp_path, "0::/jobs/a/task\n") == 2
    assert usable_cores(tmp_path, "0::/jobs/b\n") == 4
    assert usable_cores(tmp_path, "0::/elsewhere\n") == 8


def test_cgroups_of_version_1_count_too(eight_cores, tmp_path):
    own = tmp_path / "cpu,cpuacct/docker/x"
    write(own / "cpu.cfs_quota_us", "-1\n")
    write(own / "cpu.cfs_period_us", "100000\n")
    membership = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n3:cpuset:/docker/y\n"
    assert usable_cores(tmp_path, membership) == 8
    write(own / "cpu.cfs_quota_us", "250000\n")
    assert usable_cores(tmp_path, membership) == 2
    assert usable_cores(tmp_path, "3:cpuset:/docker/x\n") == 8


def test_memory_is_within_the_limit_of_the_container(tmp_path):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    write(tmp_path / "memory.max", "max\n")
    assert usable_memory(tmp_path, "") == whole
    write(tmp_path / "memory/docker/x/memory.limit_in_bytes", f"{2 * GIB}\n")
    assert usable_memory(tmp_path, "5:memory:/docker/x\n") == 2 * GIB
    write(tmp_path / "pod/memory.max", f"{GIB}\n")
    assert usable_memory(tmp_path, "0::/pod/x\n") == GIB
    write(tmp_path / "memory.max", f"{GIB // 2}\n")
    assert usable_memory(tmp_path, "") == GIB // 2


def test_this_machine_has_what_cuda_shows(monkeypatch):
    gpus = (Gpu("A100", 80 * GIB, (8, 0), 3), Gpu("T4", 15 * GIB, (7, 5), 7))
    monkeypatch.setattr(machine.cuda, "driver", lambda: Driver(gpus, (13, 0)))
    here = machine.this_machine()
    assert (here.gpus, here.gpu, here.devices, here.nodes) == (2, Gpu("T4", 15 * GIB, (7, 5), 7), gpus, 1)
    assert here.no_gpu is None and here.assumed is None
    monkeypatch.setattr(machine.cuda, "driver", lambda: Driver(problem="the CUDA driver crashes (signal 11)"))
    here = machine.this_machine()
    assert (here.gpus, here.gpu, here.no_gpu) == (0, None, "the CUDA driver crashes (signal 11)")


def test_a_machine_is_described_by_nodes_gpus_and_gigabytes():
    gpu = Gpu("80 GB GPU", round(78.4 * GIB), (8, 0))
    assert described("80") == described("1x80") == described("1x1x80")
    two = described("2x8x80")
    assert (two.nodes, two.gpus, two.all_gpus, two.gpu, two.devices) == (2, 8, 16, gpu, (gpu,) * 8)
    assert (two.cores, two.memory_bytes) == (128, 1024 * GIB)
    assert two.assumed == (
        "planned for 2 nodes with each 8 GPUs of 80 GB (--gpus), not for this machine; assumed: 78.4 GiB of each are usable, "
        "compute capability 8.0, 128 cores and 1024 GiB of main memory a node"
    )
    small = described("24", capability=(8, 9))
    assert (small.gpus, small.gpu.memory_bytes, small.gpu.capability) == (1, round(23.52 * GIB), (8, 9))
    assert small.assumed.startswith("planned for 1 GPU of 24 GB (--gpus), not for this machine; assumed: 23.5 GiB")


@pytest.mark.parametrize("text", ["", "x", "8x", "0x80", "8x0", "1x2x3x4", "8x80GB", "-1", "1.5x80", "8 x 80", "99999"])
def test_a_description_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(ConfigError) as refused:
        described(text)
    got = repr(text) if text else "nothing"
    assert str(refused.value) == (
        f"--gpus: got {got}, expected NODESxGPUSxGB such as 2x8x80, or 8x80, or 24 for one GPU"
    )


def test_the_switch_is_taken_out_of_the_words():
    assert take_described(["a=1", "b=2"]) == (None, ["a=1", "b=2"])
    assert take_described(["a=1", "--gpus", "8x80", "b=2"]) == (described("8x80"), ["a=1", "b=2"])
    assert take_described(["--gpus=24"]) == (described("24"), [])
    with pytest.raises(ConfigError, match="--gpus: got nothing, expected"):
        take_described(["--gpus"])
    with pytest.raises(ConfigError, match="--gpus: got it twice"):
        take_described(["--gpus=1x24", "--gpus", "80"])


def test_actors_with_gpus_have_their_share_of_the_cores():
    assert [threads_of(gpus, 2, 0) for gpus in (0, 0.5, 1)] == [2, 2, 2]  # no GPU: as ever
    assert [threads_of(gpus, 32, 8) for gpus in (0, 0.5, 1, 2, 8)] == [32, 2, 4, 8, 32]


GPUS = ["cluster.gpus_per_policy_rank=1", "cluster.gpus_per_rollout_engine=1"]


def test_a_plan_for_a_machine_that_is_not_here(capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a description stands for the cluster that is joined
    assert main(["plan", "experiment=tiny_grpo", "--gpus", "2x8x80", *GPUS]) == 0
    out = capsys.readouterr().out
    assert "planned for 2 nodes with each 8 GPUs of 80 GB (--gpus)" in out
    assert "2 x 128 cores, 2 x 8 GPUs, 2 x 1024.0 GiB memory" in out
    assert "joined by address" not in out


def test_bad_switches_are_one_line(capsys):
    assert main(["plan", "experiment=tiny_grpo", "--gpus", "lots"]) == 2
    assert capsys.readouterr().err == (
        "error: --gpus: got 'lots', expected NODESxGPUSxGB such as 2x8x80, or 8x80, or 24 for one GPU\n"
    )
    assert main(["train", "experiment=tiny_grpo", "--gpus=8x80"]) == 2
    assert capsys.readouterr().err == (
        "error: train: got '--gpus=8x80', expected cluster.gpus_per_policy_rank=1 and the like: --gpus is for apportion plan\n"
    )
    assert main(["plan", "experiment=tiny_grpo", "--gpu=8x80"]) == 2
    assert capsys.readouterr().err == (
        "error: plan: got '--gpu=8x80', expected KEY=VALUE, --help, --cfg job, --multirun or --config-dir DIR (did you "
        "mean '--gpus'?)\n"
    )
