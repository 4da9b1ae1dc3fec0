"""The machine that a run would have: this one, or one that `apportion plan --gpus` describes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Protocol

from apportion.platform import cuda
from apportion.platform.cuda import Gpu
from apportion.platform.errors import ConfigError

GIB = 2**30
# Of a described machine: cores and main memory of a node for each of its GPUs, and what a card reports of its gigabytes.
CORES_A_GPU, MEMORY_A_GPU = 16, 128 * GIB
REPORTED = 0.98
SWITCH = "--gpus"
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What a run would have for itself: `nodes` alike, for an embedded Ray this one."""

    cores: int  # of a node
    memory_bytes: int
    gpus: int
    gpu: Gpu | None = None  # the least of them; None: nothing is known of them but their number
    nodes: int = 1
    devices: tuple[Gpu, ...] = ()  # each of a node's GPUs in CUDA's order, where they are known
    no_gpu: str | None = None  # why there is none, where that is known
    assumed: str | None = None  # what a machine that is only described is taken to have

    @property
    def all_gpus(self) -> int:
        return self.gpus * self.nodes


class Seat(Protocol):
    """What every `cluster` section has."""

    address: str | None


def joins(cluster: Seat) -> bool:
    """Whether a run joins a cluster, which is then not this machine."""
    return cluster.address is not None or bool(os.environ.get("RAY_ADDRESS"))


def this_machine() -> Machine:
    """Cores and memory that this process's container may use, GPUs that CUDA shows."""
    driver = cuda.driver()
    why = None if driver.gpus else driver.why_none(os.environ.get("CUDA_VISIBLE_DEVICES"))
    number = len(driver.gpus)
    return Machine(usable_cores(), usable_memory(), number, cuda.least(driver.gpus), 1, driver.gpus, why)


def usable_cores(folder: Path = _CGROUPS, membership: str | None = None) -> int:
    """Cores that this process may run on, within its container's CPU quota; at least 1."""
    cores = float(len(os.sched_getaffinity(0)))
    for place in _groups("cpu", folder, membership):
        limit = (_words(place / "cpu.max") or ["max"])[:2]
        if len(limit) == 2 and limit[0].isdigit() and int(limit[1]):
            cores = min(cores, int(limit[0]) / int(limit[1]))
        quota, period = _words(place / "cpu.cfs_quota_us"), _words(place / "cpu.cfs_period_us")
        if quota and period and quota[0].isdigit() and int(period[0]):  # -1: no limit
            cores = min(cores, int(quota[0]) / int(period[0]))
    return max(1, floor(cores))


def usable_memory(folder: Path = _CGROUPS, membership: str | None = None) -> int:
    """Bytes of main memory, within its container's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for place in _groups("memory", folder, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _words(place / name)
            if limit and limit[0].isdigit():
                memory = min(memory, int(limit[0]))
    return memory


def _groups(controller: str, folder: Path, membership: str | None) -> Iterator[Path]:
    """Folders of the cgroups that limit this process: its own and those above it, of version 2 and of version 1.
    `membership` is what /proc/self/cgroup says."""
    if membership is None:
        try:
            membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        except OSError:
            membership = ""
    yield from (folder, folder / controller)
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        roots = [folder] if not controllers else [folder / controllers, folder / controller]
        for root in roots:
            place = root / own.lstrip("/")
            while place != root and root in place.parents:
                yield place
                place = place.parent
            yield root


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []


def threads_of(gpus: float, cores: int, node_gpus: float) -> int:
    """Threads of an actor with so many of a node's GPUs: its share of the cores, since those that have GPUs work side by
    side; all of them for one without, which takes turns with others.

    >>> threads_of(1, 128, 8), threads_of(0.5, 16, 1), threads_of(0, 16, 1), threads_of(1, 4, 8)
    (16, 8, 16, 1)
    """
    return cores if gpus == 0 or not node_gpus else max(1, min(cores, floor(cores * gpus / node_gpus)))


def take_described(words: Sequence[str]) -> tuple[Machine | None, list[str]]:
    """The machine that `--gpus` among the words of `plan` describes, if any, and the other words."""
    rest: list[str] = []
    machine = None
    given = iter(words)
    for word in given:
        name, equals, value = word.partition("=")
        if name != SWITCH:
            rest.append(word)
        elif machine is not None:
            raise ConfigError(f"{SWITCH}: got it twice, expected one machine")
        else:
            machine = described(value if equals else next(given, ""))
    return machine, rest


def described(text: str, capability: tuple[int, int] = (8, 0)) -> Machine:
    """The machine of a text NODESxGPUSxGB: 2x8x80 is two nodes with 8 GPUs of 80 GB; nodes and GPUs may be left out."""
    match = re.fullmatch(r"(?:(?:([1-9]\d{0,3})x)?([1-9]\d{0,2})x)?([1-9]\d{0,3})", text)
    if match is None:
        got = repr(text) if text else "nothing"
        raise ConfigError(f"{SWITCH}: got {got}, expected NODESxGPUSxGB such as 2x8x80, or 8x80, or 24 for one GPU")
    nodes, gpus, gigabytes = int(match[1] or 1), int(match[2] or 1), int(match[3])
    gpu = Gpu(f"{gigabytes} GB GPU", round(REPORTED * gigabytes * GIB), capability)
    cores, memory = CORES_A_GPU * gpus, MEMORY_A_GPU * gpus
    several = "" if nodes == 1 else f"{nodes} nodes with each "
    assumed = (
        f"planned for {several}{gpus} GPU{'s' if gpus > 1 else ''} of {gigabytes} GB ({SWITCH}), not for this machine; assumed: "
        f"{gpu.memory_bytes / GIB:.1f} GiB of each are usable, compute capability {capability[0]}.{capability[1]}, {cores} "
        f"cores and {memory // GIB} GiB of main memory a node"
    )
    return Machine(cores, memory, gpus, gpu, nodes, (gpu,) * gpus, assumed=assumed)
