"""What every actor process has in common: its own log file, its pid, its peak memory."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.platform import logs
from apportion.platform.device_memory import DeviceMemory, device_memory
from apportion.platform.inherited import keep_sockets_from_children
from apportion.platform.known_secrets import known, redacted_text
from apportion.platform.messages import say
from apportion.platform.rendezvous import hold_port
from apportion.platform.streams import mask_output


@dataclass
class ProcessInfo:
    pid: int
    host: str
    log: str


class ActorBase:
    """Mixed into actor classes; everything here may be called remotely.

    What a constructor or a call raises goes to Ray, which writes it into logs of its own: it leaves without secrets.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
                setattr(cls, name, _raising_no_secrets(method))

    def __new__(cls, *args: object, **kwargs: object) -> ActorBase:
        log_to_file()  # before the constructor, which is where most things go wrong
        if "APPORTION_LOG" in os.environ:  # in a process of Ray's
            mask_output()
            keep_sockets_from_children()
        find_environment_programs()
        find_user_modules()
        return super().__new__(cls)

    def describe(self) -> ProcessInfo:
        return ProcessInfo(os.getpid(), socket.gethostname(), os.environ.get("APPORTION_LOG", ""))

    def sees(self, file: str) -> bool:
        """Whether this process's node has a file that another node's process has written."""
        return Path(file).is_file()

    def peak_memory_mib(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def device_memory(self) -> DeviceMemory | None:
        """Of this process on its GPU, since the last call; None without one."""
        return device_memory()

    def free_port(self, local: bool) -> tuple[str, int]:
        """This node's address as others reach it (loopback if all are here), and a port of it that this process keeps for
        the store that it will open there."""
        import ray

        address = "127.0.0.1" if local else ray.util.get_node_ip_address()
        return address, hold_port(address)

    def stop(self) -> None:
        """Leave at once; Ray sees an intended exit."""
        import ray

        ray.actor.exit_actor()


def _raising_no_secrets(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if method.__name__ == "__init__":  # Ray makes the object first, without arguments
            known.learn([*args[1:], *kwargs.values()])
        try:
            return method(*args, **kwargs)
        except Exception as error:
            mask_error(error)
            raise

    return call


def mask_error(error: BaseException) -> None:
    """Mask the secrets in an error's texts, and in those of the errors behind it, in place."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        for name in ("args", "strerror", "filename", "filename2", "reason", "msg"):  # of Python's own errors
            if (value := getattr(one, name, None)) is not None:
                with contextlib.suppress(AttributeError):  # it cannot be set
                    setattr(one, name, _masked(value))
        own = vars(one)  # what a class of its own keeps, and notes
        own.update({name: _masked(value) for name, value in own.items()})


def _masked(value: Any, depth: int = 4) -> Any:
    if isinstance(value, str):
        return redacted_text(value)
    if depth and type(value) is dict:
        return {_masked(key, depth - 1): _masked(inner, depth - 1) for key, inner in value.items()}
    if depth and type(value) in (list, tuple):
        return type(value)(_masked(element, depth - 1) for element in value)
    return value


def find_environment_programs() -> None:
    """Put this Python's own folder first on PATH: DeepSpeed and torch call ninja from there to compile."""
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if own not in path.split(os.pathsep):
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"


def find_user_modules() -> None:
    """Put the folders named in APPORTION_MODULES last on this process's path: nothing of theirs hides what is installed.

    This process was started with PYTHONSAFEPATH, which its children of `multiprocessing` take over; programs that the user's
    code starts are not to have it.
    """
    os.environ.pop("PYTHONSAFEPATH", None)
    for folder in os.environ.get("APPORTION_MODULES", "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)


@contextmanager
def safe_children() -> Iterator[None]:
    """Programs that a library starts meanwhile find nothing of the working folder before what is installed: `python -m`,
    with which vLLM reads a model's class, puts it first."""
    given = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = given


def working_folder_last() -> None:
    """Put the working folder last on this process's path, for a method, reward or environment of the user's: it hides
    nothing there. `python -m` and an empty entry of PYTHONPATH put it first; where PYTHONPATH names it, it stays."""
    here = os.getcwd()
    named = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if here not in named:
        sys.path[:] = [*(entry for entry in sys.path if entry not in ("", here)), here]


def log_to_file() -> None:
    """Send this process's output, that of its libraries and children included, to the file named in APPORTION_LOG."""
    path = os.environ.get("APPORTION_LOG")
    if not path:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:  # another node without the run's folder: Ray keeps the output then
        say(f"log file {path} cannot be written here: {error}", sys.stderr)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    logs.keep_short(Path(path))


def tail(path: str, lines: int = 15) -> str:
    """The last lines of a text file, or an empty string if there is none here."""
    try:
        with open(path, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            size = handle.tell()
            handle.seek(max(0, size - 16384))
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
