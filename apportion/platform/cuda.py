"""The GPUs that CUDA shows this process, asked without torch.

CUDA is what runs on them, so it is what counts them: it honors CUDA_VISIBLE_DEVICES, and under WSL2 there is no
/dev/nvidia* to count.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

LIBRARY = "libcuda.so.1"
ASK_SECONDS = 20.0  # a first cuInit after a boot takes seconds, and one with many GPUs too
TOOL_SECONDS = 10.0
MIB = 2**20
_WSL_TOOL = Path("/usr/lib/wsl/lib/nvidia-smi")
_CHILD = Path(__file__).with_name("cuda_driver.py")


@dataclass(frozen=True)
class Gpu:
    """One device, as CUDA describes it."""

    name: str
    memory_bytes: int  # that CUDA reports: less than what the card is sold with
    capability: tuple[int, int]  # compute capability: (8, 0) for an A100
    used_bytes: int | None = None  # by processes that run now; None: not known


@dataclass(frozen=True)
class Driver:
    """What CUDA's driver answered."""

    gpus: tuple[Gpu, ...] = ()  # in CUDA's order
    cuda: tuple[int, int] | None = None  # the newest CUDA that it serves: (13, 0)
    problem: str | None = None  # why it did not answer, where a driver is installed
    installed: bool = True  # whether there is one at all

    def why_none(self, visible: str | None) -> str:
        """Why there is no GPU. `visible` is CUDA_VISIBLE_DEVICES, None where it is not set."""
        if not self.installed:
            return f"{LIBRARY} is not found: no NVIDIA driver is installed, or the container has no access to it"
        if self.problem is not None:
            return self.problem
        if visible is not None:
            return f"CUDA_VISIBLE_DEVICES is {visible!r}"
        return "the driver finds no device"


class Late(Exception):
    """A command did not end in time."""


@functools.cache
def driver() -> Driver:
    """What CUDA shows this process, asked once."""
    return ask()


def ask(library: str = LIBRARY, seconds: float = ASK_SECONDS) -> Driver:
    """Ask the driver in a process of its own, if there is one. Never raises: what goes wrong is `problem`."""
    try:
        ctypes.CDLL(library)  # loads it and starts nothing
    except OSError as error:
        if str(error).startswith(f"{library}: cannot open shared object file"):
            return Driver(installed=False)
        return Driver(problem=f"the CUDA driver cannot be loaded ({error})")
    try:
        code, text, complaint = output([sys.executable, "-I", "-S", str(_CHILD), library], seconds)
    except Late:
        return Driver(problem=f"the CUDA driver does not answer within {seconds:g} s")
    except OSError as error:
        return Driver(problem=f"the CUDA driver cannot be asked ({error})")
    if code < 0:
        return Driver(problem=f"the CUDA driver crashes (signal {-code})")
    if code:
        last = complaint.strip().splitlines()[-1:] or ["no words"]
        return Driver(problem=f"the CUDA driver cannot be asked ({last[0]})")
    return _read(text)


def _read(text: str) -> Driver:
    """The driver's answer. Numbers that no machine has are told rather than believed."""
    try:
        answer = json.loads(text)
        version = int(answer["version"])
        cuda = (version // 1000, version % 1000 // 10)
        if "error" in answer:
            return Driver(cuda=cuda, problem=f"the CUDA driver answers with an error ({answer['error']})")
        gpus = [(_gpu(one), str(UUID(hex=one["uuid"]))) for one in answer["gpus"]]
    except (ValueError, KeyError, TypeError) as error:
        return Driver(problem=f"the CUDA driver's answer makes no sense ({type(error).__name__}: {error})")
    if not gpus:
        return Driver(cuda=cuda)
    used = used_bytes()
    return Driver(tuple(_with_use(gpu, used.get(uuid)) for gpu, uuid in gpus), cuda)


def _gpu(one: dict[str, Any]) -> Gpu:
    major, minor = (int(part) for part in one["capability"])
    gpu = Gpu(str(one["name"]), int(one["memory"]), (major, minor))
    if gpu.memory_bytes < MIB or major < 1:
        raise ValueError(
            f"{gpu.name or 'a device'} with {gpu.memory_bytes} bytes and compute capability {major}.{minor}"
        )
    return gpu


def _with_use(gpu: Gpu, used: int | None) -> Gpu:
    """`used` is of the whole card: what it says of a slice (MIG) is not known."""
    return gpu if " MIG " in gpu.name else Gpu(gpu.name, gpu.memory_bytes, gpu.capability, used)


def least(gpus: Sequence[Gpu]) -> Gpu | None:
    """One GPU that stands for the least of each property, which every one of them has."""
    if not gpus:
        return None
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes)
    used = [gpu.used_bytes for gpu in gpus if gpu.used_bytes is not None]
    return Gpu(smallest.name, smallest.memory_bytes, min(gpu.capability for gpu in gpus), max(used, default=None))


# nvidia-smi


def nvidia_smi() -> str | None:
    """Where the tool is; WSL2 keeps it in a folder that is not always searched."""
    return shutil.which("nvidia-smi") or (str(_WSL_TOOL) if os.access(_WSL_TOOL, os.X_OK) else None)


def query(*words: str) -> str | None:
    """What nvidia-smi prints; None where it is not there, fails or is late."""
    tool = nvidia_smi()
    if tool is None:
        return None
    try:
        code, text, _ = output([tool, *words], TOOL_SECONDS)
    except (OSError, Late):
        return None
    return None if code else text


def used_bytes() -> dict[str, int]:
    """UUID of each GPU -> bytes in use on it. What nvidia-smi does not say is left out."""
    used = {}
    for line in (query("--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits") or "").splitlines():
        uuid, _, mebibytes = (part.strip() for part in line.partition(","))
        if uuid.startswith("GPU-") and mebibytes.isdigit():  # else [N/A] or [Insufficient Permissions]
            used[uuid.removeprefix("GPU-").lower()] = int(mebibytes) * MIB
    return used


def output(command: list[str], seconds: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command; Late if it takes longer. One that cannot be killed, since it waits in a
    broken driver, is left behind: nobody waits for it."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        text, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
        raise Late(command[0]) from None
    except BaseException:
        process.kill()
        raise
    return process.returncode, text, complaint
