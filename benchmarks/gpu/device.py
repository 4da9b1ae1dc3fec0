"""Time and memory on a device, and what the machine is."""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

GIB = 2**30
LARGE_BYTES = 60 * GIB  # of a GPU that holds the larger cases

# Dense bf16 FLOP/s as the makers state them, by a word of the device's name; the first that matches.
PEAK_FLOPS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "A10G": 70e12, "A10": 125e12, "L4": 121e12,
}  # fmt: skip


def finish(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, repeats: int = 3, warm_up: int = 1) -> float:
    """The least seconds of `repeats` runs, after `warm_up` others."""
    for _ in range(warm_up):
        work()
    measured = []
    for _ in range(repeats):
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        measured.append(time.perf_counter() - start)
    return min(measured)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most device memory that `work` takes beyond what was allocated before. Needs a GPU."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float32."""
    wanted = reference.detach().float()
    return float((value.detach().float() - wanted).norm() / wanted.norm())


def largest_gap(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.detach().float() - reference.detach().float()).abs().max())


def matmul_flops(device: str) -> float:
    """FLOP/s of one large bf16 matrix product: what this device can do at best."""
    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, device, repeats=5, warm_up=2)


def stated_flops(name: str) -> float | None:
    """The maker's dense bf16 FLOP/s; None for a device that the table lacks."""
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def large_gpu() -> bool:
    return torch.cuda.get_device_properties(0).total_memory > LARGE_BYTES


def driver() -> dict[str, Any]:
    """Driver version and MiB in use on the first visible GPU, asked without making a CUDA context. Without the second
    where it is not known (MIG, memory shared with the CPU), empty without an answer of nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [
        "nvidia-smi", f"--id={first}", "--query-gpu=driver_version,memory.used", "--format=csv,noheader,nounits",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode or not done.stdout.strip():
        return {}
    release, _, used = (word.strip() for word in done.stdout.splitlines()[0].partition(","))
    return {"driver": release} | ({"used_mib": float(used)} if used.isdecimal() else {})


def describe(device: str) -> dict[str, Any]:
    """What a report says of the machine."""
    facts: dict[str, Any] = {
        "device": "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    for package in ("transformers", "vllm", "deepspeed", "ray"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / GIB, 2),
            "driver": driver().get("driver"),
        }
    return facts
