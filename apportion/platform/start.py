"""What Ray needs to start, and one line for each way in which it does not.

Ray keeps its session in `RAY_TMPDIR`, else `TMPDIR`, else /tmp, with Unix sockets in it, whose paths have a limit of their
own; its token in `~/.ray`; its objects in /dev/shm.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.platform.errors import ApportionError, ConfigError
from apportion.platform.files import make_private_file
from apportion.platform.notices import notify

SOCKET_BYTES = 107  # the longest path of a Unix socket on Linux
# What Ray puts behind its folder, with a process id of 7 digits.
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
LONGEST_FOLDER = SOCKET_BYTES - len(_SOCKET)
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
SMALLEST_SPACE = 64 * 2**20  # bytes free that a session takes at the least
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class _NoFolders(list[str]):
    """Stays empty: Ray would put the script's folder and the working folder before what is installed in every worker, where
    a user's tokenizers.py hides the library."""

    def extend(self, folders: Any) -> None:
        pass


def job_config(namespace: str) -> Any:
    """Ray's settings of a run, whose workers find the user's modules by `process.find_user_modules` alone."""
    from ray.job_config import JobConfig

    job = JobConfig(ray_namespace=namespace)
    job._py_driver_sys_path = _NoFolders()
    return job


def worker_variables() -> dict[str, str]:
    """What an actor's process is started with: no added folder goes before what is installed, not in the processes that
    vLLM starts either, whose sockets need a short folder."""
    variables = {"PYTHONSAFEPATH": "1"}
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_FOLDER:
        short = next((place for place in SHORT_FOLDERS if problem(Path(place)) is None), None)
        variables |= {} if short is None else {"VLLM_RPC_BASE_PATH": short}
    return variables


def temporary_folder(environment: Mapping[str, str]) -> tuple[str, Path]:
    """The folder under which Ray puts its sessions, and the name of the variable that says so."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if environment.get(name):
            return name, Path(environment[name])
    return "TMPDIR", Path("/tmp")


def session_folder(environment: Mapping[str, str]) -> Path:
    """Where this process's Ray is to keep its sessions: under the temporary folder, or under a short one where a TMPDIR is
    too long for sockets. ConfigError where no folder will do."""
    name, folder = temporary_folder(environment)
    refused = problem(folder)
    if refused is not None:
        raise ConfigError(f"{name}: got {folder}, {refused}, expected a folder for Ray's session: set {name}=/tmp, say")
    size = len(os.fsencode(folder.absolute()))
    if size <= LONGEST_FOLDER:
        return folder.absolute() / "ray"
    short = next((Path(place) for place in SHORT_FOLDERS if problem(Path(place)) is None), None)
    if name == "RAY_TMPDIR" or short is None:
        raise ConfigError(
            f"{name}: got {folder}, {size} bytes, which is too long for Unix sockets, expected at most {LONGEST_FOLDER} "
            "bytes: set RAY_TMPDIR=/tmp, or TMPDIR=/tmp"
        )
    return short / "ray"


def session_notes(session: Path | None, environment: Mapping[str, str]) -> list[str]:
    """A line where Ray's sessions go to another folder than the environment says; `session` as `session_folder` gives it."""
    name, folder = temporary_folder(environment)
    if session is None or session == folder.absolute() / "ray":
        return []
    return [f"{name} is too long for Unix sockets: Ray's session goes to {session}"]


def problem(folder: Path) -> str | None:
    """Why a folder cannot take files, in words that follow "got FOLDER,"; None where it can. A folder that does not exist
    is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".apportion-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"where no file can be written ({error.strerror})"
    return None if free >= SMALLEST_SPACE else f"which has {free >> 20} MiB free of at least {SMALLEST_SPACE >> 20}"


def home_folder(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HOME") or os.path.expanduser("~"))


def provide_token(environment: MutableMapping[str, str]) -> None:
    """A token for a Ray of this process's own that other users cannot read: whoever has it can run code in the run.

    Ray would write ~/.ray/auth_token with the mode of any other file. Where the home folder cannot keep a token, the
    environment gets one.
    """
    if environment.get("RAY_AUTH_MODE", "").lower() == "disabled" or any(map(environment.get, _TOKEN_VARIABLES)):
        return
    file = home_folder(environment) / ".ray" / "auth_token"
    if file.is_file():
        _keep_from_others(file)
        return
    try:
        make_private_file(file, secrets.token_hex(32))
    except OSError:
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _keep_from_others(file: Path) -> None:
    try:
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)
            notify(
                f"warning: other users could read {file}, Ray's token: its mode is 0600 now; if others use this machine, "
                "delete the file, and the next run makes a new token"
            )
    except OSError as error:
        notify(f"warning: other users can read {file}, Ray's token ({error.strerror}): set its mode to 0600")


@contextmanager
def on_loopback() -> Iterator[None]:
    """Ray's servers that are started meanwhile listen on 127.0.0.1 alone; otherwise on every interface.

    Ray replaces 127.0.0.1 in `_node_ip_address` by the address that other machines see. What it has for this is a
    switch (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER), which it reads from the environment when it is first imported.
    """
    from ray._private import ray_constants

    given = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = given


def explained(error: Exception, address: str | None, folder: Path | None) -> ApportionError:
    """The one line for what ray.init raised. `address` is the cluster's that was to be joined, None for a Ray of this
    process's own, whose sessions are in `folder`."""
    text = " ".join(str(error).split()) or type(error).__name__
    if address is not None:
        return ConfigError(f"cluster.address: cannot reach {address}: {_cannot_join(error, text)}")
    if isinstance(error, OSError):
        return _refused_by_system(error, text, folder)
    if "/dev/shm" in text or "object store memory" in text:
        return ConfigError(
            f"/dev/shm: got too little room for Ray's object store ({_short(text)}), expected more: set "
            "cluster.object_store_gib, remove what is left over in /dev/shm, or in a container: --shm-size=4g"
        )
    if _is_about_token(error, text):
        return ConfigError(f"RAY_AUTH_MODE: got no valid token ({_short(text)}), expected {_TOKEN_CURE}")
    logs = f"{folder}/session_latest/logs"
    if "ddress already in use" in text or "port" in text.lower().split():
        return ApportionError(
            f"Ray did not start on this machine: {_short(text)} Its logs are under {logs}; end the process that has the "
            "port, or try again: ports are drawn anew"
        )
    return ApportionError(
        f"Ray did not start on this machine: {_short(text)} Its logs are under {logs}; a busy or full machine may only "
        "need another try; `apportion doctor` looks at what Ray needs"
    )


_TOKEN_CURE = "the cluster's token in RAY_AUTH_TOKEN, or in a file named by RAY_AUTH_TOKEN_PATH (ray get-auth-token)"


def _cannot_join(error: Exception, text: str) -> str:
    if "ersion mismatch" in text:
        return f"{text[:400]}; install the same versions of Ray and Python on both sides"
    if _is_about_token(error, text):
        return f"{_short(text)}; set {_TOKEN_CURE}"
    return f"{_short(text)}; start it (ray start --head), or unset RAY_ADDRESS and cluster.address for a Ray of the run's own"


def _is_about_token(error: Exception, text: str) -> bool:
    return type(error).__name__ == "AuthenticationError" or "authentication token" in text or "Unauthenticated" in text


def _refused_by_system(error: OSError, text: str, folder: Path | None) -> ApportionError:
    where = error.filename or folder
    if "AF_UNIX" in text:
        return ConfigError(
            f"TMPDIR: got {folder}, which is too long for Unix sockets, expected at most {LONGEST_FOLDER} bytes: set "
            "RAY_TMPDIR=/tmp, or TMPDIR=/tmp"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApportionError(
            f"Ray did not start on this machine: no space left at {where}: free some, or set TMPDIR elsewhere"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return ConfigError(
            f"{where}: got {error.strerror}, expected a folder that Ray can write: set HOME for files under the home "
            "folder, TMPDIR for others"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ApportionError("Ray did not start on this machine: too many open files, expected more: ulimit -n 65536")
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return ApportionError(
            "Ray did not start on this machine: no process or memory left, expected more of both (ulimit -u, and what else "
            "runs here)"
        )
    if error.errno == errno.EADDRINUSE:
        return ApportionError(
            f"Ray did not start on this machine: {_short(text)}; end the process that has the port, or try again: ports "
            "are drawn anew"
        )
    return ApportionError(f"Ray did not start on this machine: {_short(text)}")


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "..."
