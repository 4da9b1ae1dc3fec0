"""GPUs are counted by asking a CUDA driver: a compiled fake answers, fails, hangs, crashes and lies."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_cuda import compiled, tool

from apportion.platform import cuda
from apportion.platform.cuda import MIB, Driver, Gpu, ask, least

A100_UUID, T4_UUID = "28" * 4, "29" * 4  # of devices 40 and 41, in hexadecimal


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(**changes):
        key = str(sorted(changes.items()))
        if key not in made:
            made[key] = compiled(tmp_path_factory.mktemp("driver"), **changes)
        return str(made[key])

    return get


@pytest.fixture(autouse=True)
def no_tool(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda, "nvidia_smi", lambda: None)


def test_two_gpus_are_described_by_the_driver_alone(drivers):
    found = ask(drivers())
    assert found == Driver(
        (Gpu("NVIDIA A100-SXM4-80GB", 84986691584, (8, 0)), Gpu("Tesla T4", 15655829504, (7, 5))), cuda=(13, 1)
    )
    assert least(found.gpus) == Gpu("Tesla T4", 15655829504, (7, 5))
    assert least([]) is None


def test_memory_in_use_comes_from_nvidia_smi_by_uuid(drivers, tmp_path, monkeypatch):
    lines = [
        f"GPU-{T4_UUID}-2929-2929-2929-{'29' * 6}, 312",
        f"GPU-{A100_UUID}-2828-2828-2828-{'28' * 6}, 40960",
        "GPU-00000000-0000-0000-0000-000000000000, [N/A]",
    ]
    smi = tool(tmp_path, "echo '" + "\n".join(lines) + "'")
    monkeypatch.setattr(cuda, "nvidia_smi", lambda: str(smi))
    assert [gpu.used_bytes for gpu in ask(drivers()).gpus] == [40960 * MIB, 312 * MIB]
    assert least(ask(drivers()).gpus).used_bytes == 40960 * MIB
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 255\n")
    assert [gpu.used_bytes for gpu in ask(drivers()).gpus] == [None, None]
    monkeypatch.setattr(cuda, "TOOL_SECONDS", 0.2)
    smi.write_text("#!/bin/sh\nexec sleep 30\n")
    began = time.monotonic()
    assert [gpu.used_bytes for gpu in ask(drivers()).gpus] == [None, None]
    assert time.monotonic() - began < 10


def test_a_slice_of_a_card_does_not_take_the_whole_cards_use():
    assert cuda._with_use(Gpu("NVIDIA A100 MIG 1g.5gb", 5 * 2**30, (8, 0)), 7).used_bytes is None
    assert cuda._with_use(Gpu("NVIDIA A100", 5 * 2**30, (8, 0)), 7).used_bytes == 7


def test_a_driver_without_a_device_says_why(drivers, monkeypatch):
    none = ask(drivers(COUNT=0))
    assert none == Driver((), (13, 1)) and none.why_none(None) == "the driver finds no device"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = ask(drivers())
    assert hidden == Driver((), (13, 1)) and hidden.why_none("") == "CUDA_VISIBLE_DEVICES is ''"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ERROR": 999}, "the CUDA driver answers with an error (cuInit: CUDA_ERROR_UNKNOWN (999))"),
        ({"ERROR": 12345}, "the CUDA driver answers with an error (cuInit: error 12345)"),
        ({"CRASHES": 1}, "the CUDA driver crashes (signal 11)"),
        ({"MEMORY": 0}, "the CUDA driver's answer makes no sense (ValueError: NVIDIA A100-SXM4-80GB with 0 bytes and "
                        "compute capability 8.0)"),
    ],
)  # fmt: skip
def test_a_broken_driver_is_told(drivers, changes, problem):
    found = ask(drivers(**changes))
    assert found.gpus == () and found.problem == problem and found.installed
    assert found.why_none("0,1") == problem


def test_a_driver_that_hangs_is_not_waited_for(drivers):
    began = time.monotonic()
    assert ask(drivers(HANGS=1), seconds=0.5).problem == "the CUDA driver does not answer within 0.5 s"
    assert time.monotonic() - began < 10


def test_no_driver_costs_no_process_and_one_that_cannot_be_loaded_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "output", lambda *_: pytest.fail("a process was started"))
    absent = ask("libcuda-that-is-nowhere.so.1")
    assert absent == Driver(installed=False)
    assert absent.why_none(None).startswith("libcuda.so.1 is not found: no NVIDIA driver is installed")
    broken = tmp_path / "libcuda.so.1"
    broken.write_bytes(b"")
    assert ask(str(broken)).problem == f"the CUDA driver cannot be loaded ({broken}: file too short)"


def test_this_machine_counts_through_the_library_that_the_loader_finds(drivers):
    program = (
        "from apportion.conf.machine import this_machine as t; m = t();"
        "print(m.gpus, m.gpu.name, m.gpu.capability, [d.name for d in m.devices], m.no_gpu)"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(drivers()).parent)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "2 Tesla T4 (7, 5) ['NVIDIA A100-SXM4-80GB', 'Tesla T4'] None\n", ran.stderr
