"""Ray: start or join it, start actors, wait for them with a deadline, and turn what goes wrong into a cause.

Every remote call of a run goes through `gather`: no wait is unbounded, and an error names the actor, what it was doing,
why it stopped, and its last log lines.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.platform import cuda, errors, health, logs, progress, start
from apportion.platform.death import cause_of_death, lost_node, useful_words, witness
from apportion.platform.errors import ActorError, ApportionError, CheckpointError, ConfigError
from apportion.platform.known_secrets import NAMES, known
from apportion.platform.notices import notices, notify
from apportion.platform.process import ProcessInfo, tail
from apportion.platform.progress import Clocks
from apportion.platform.room import asked
from apportion.platform.session import MARK
from apportion.platform.teardown import Remains

POLL_SECONDS = 1.0
STARTING = "start of actors"  # what is waited for, where cluster.start_timeout_seconds is the limit
DOWNLOADING = "download of models"  # likewise cluster.download_timeout_seconds
_OWN_ERROR = re.compile(r"^apportion\.platform\.errors\.(\w+Error): ", re.MULTILINE)


@dataclass
class ActorRequest:
    """One actor to be started."""

    name: str  # unique in the run; names its log file
    cls: type
    arguments: tuple = ()
    cpus: float = 0.0
    gpus: float = 0.0
    environment: dict[str, str] | None = None
    node: str | None = None  # the id of the node that it has to run on


@dataclass
class Actor:
    """A running actor. `call` gives a Call, to be awaited with `gather`."""

    name: str
    handle: Any
    log: str
    info: ProcessInfo | None = None
    progress: str = ""  # the key under which it counts what it does
    gpus: float = 0.0

    def call(self, method: str, *arguments: Any, returns: int = 1) -> Call:
        bound = getattr(self.handle, method)
        refs = bound.options(num_returns=returns).remote(*arguments) if returns != 1 else bound.remote(*arguments)
        return Call(self, method, list(refs) if returns != 1 else [refs])


@dataclass
class Call:
    """A remote call under way: `refs[0]` is awaited, the others may stay in the object store."""

    actor: Actor
    method: str
    refs: list[Any]

    @property
    def ref(self) -> Any:
        return self.refs[0]


class Cluster:
    """A Ray of one's own, or a seat in one that runs."""

    def __init__(
        self, address: str | None, run_name: str, cpus: float, log_folder: Path, store_gib: float | None
    ) -> None:
        self._actors: list[Actor] = []
        self._ended = False
        self.log_folder = log_folder
        notices.follow(log_folder)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would run its workers at nice 15, and so behind everything else on a machine that is also used otherwise.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray would keep the last 100,000 calls in its GCS, for a dashboard that a run does not have: 4 KiB each.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        self.joined = bool(address or os.environ.get("RAY_ADDRESS"))
        joins = (address or os.environ["RAY_ADDRESS"]) if self.joined else None
        folder = None if self.joined else start.session_folder(os.environ)
        self._remains = Remains(folder)
        try:
            self._start(joins, run_name, cpus, store_gib, folder)
        except BaseException as error:
            self._remains.end([], failed=not isinstance(error, KeyboardInterrupt))
            raise

    def _start(
        self, joins: str | None, run_name: str, cpus: float, store_gib: float | None, folder: Path | None
    ) -> None:
        try:
            with _own_signals():
                self._connect(joins, run_name, cpus, store_gib, folder)
                self._remains.started()
        except Exception as error:  # Ray has no class of its own for a node that is late
            raise start.explained(error, joins, folder) from error

    def _connect(
        self, joins: str | None, run_name: str, cpus: float, store_gib: float | None, folder: Path | None
    ) -> None:
        import ray

        common = {"job_config": start.job_config(run_name), "log_to_driver": False, "logging_level": "ERROR"}
        if joins is not None:
            ray.init(address=joins, **common)
            return
        start.provide_token(os.environ)
        os.environ.setdefault(health.RECONNECT, str(health.LOCAL_RECONNECT_SECONDS))
        memory = None if store_gib is None else int(store_gib * 2**30)
        # CPUs are Ray's accounting only: compute actors take turns on the cores.
        count = max(int(cpus) + 1, os.cpu_count() or 1)
        local = {"num_cpus": count, "include_dashboard": False, "object_store_memory": memory, "_temp_dir": str(folder)}
        driver = cuda.driver()
        if driver.installed:  # as the plan has counted them: Ray would ask another library, which may say otherwise
            local["num_gpus"] = len(driver.gpus)
        with start.on_loopback():
            ray.init(address="local", **local, **common)

    def expect(self, requests: Sequence[ActorRequest]) -> None:
        """Say at once what a joined cluster lacks of what will be asked for. An autoscaler may add it, so the run waits; a
        start that times out says it again."""
        asked.gpus = [request.gpus for request in requests] if self.joined else []
        lacking = asked.lacking()
        if lacking is not None:
            notify(f"warning: {lacking}: the start waits for more nodes, up to cluster.start_timeout_seconds")

    def launch(self, requests: Sequence[ActorRequest]) -> list[Actor]:
        """Start actors side by side without waiting for them; `ready` does."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actors = []
        for request in requests:
            log = str((self.log_folder / f"{request.name}.log").resolve())
            paths = {
                "PYTHONPATH": python_path(request.cls),
                "APPORTION_MODULES": module_folders(),
                **start.worker_variables(),
                NAMES: known.names(),
            }
            key = f"{self._remains.mark}/{request.name}"
            marks = {"APPORTION_LOG": log, MARK: self._remains.mark, progress.KEY: key}
            variables = {**marks, **paths, **(request.environment or {})}
            options = {"num_cpus": request.cpus, "num_gpus": request.gpus, "runtime_env": {"env_vars": variables}}
            if request.node is not None:
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(request.node, soft=False)
            handle = ray.remote(request.cls).options(**options).remote(*request.arguments)
            actors.append(Actor(request.name, handle, log, progress=key, gpus=request.gpus))
        self._actors += actors
        return actors

    def check_shared(self, actors: Sequence[Actor], folder: Path, timeout_seconds: float) -> None:
        """ConfigError where an actor that will write into a run's folder does not see what this process writes there:
        each node would keep its own part of a checkpoint, and the parts look whole."""
        if not self.joined:
            return
        probe = folder.resolve() / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        try:
            seen = gather([actor.call("sees", str(probe)) for actor in actors], timeout_seconds, STARTING)
        finally:
            probe.unlink()
        for actor, there in zip(actors, seen, strict=True):
            if not there:
                where = actor.info.host if actor.info else "its node"
                raise ConfigError(
                    f"runs_folder: got {folder.parent}, where {actor.name} on {where} does not find what is written here, "
                    "expected a folder that all nodes share"
                )

    def ready(self, actors: Sequence[Actor], timeout_seconds: float, joining: Sequence[Call] = ()) -> None:
        """Wait until each actor has been constructed, and `joining`, what some of them were asked at once, is done."""
        calls = [actor.call("describe") for actor in actors]
        infos = gather([*calls, *joining], timeout_seconds, STARTING)
        for actor, info in zip(actors, infos, strict=False):
            actor.info = info
            witness.watch(info)

    def start(self, requests: Sequence[ActorRequest], timeout_seconds: float) -> list[Actor]:
        """Start actors side by side and wait until each has been constructed."""
        actors = self.launch(requests)
        self.ready(actors, timeout_seconds)
        return actors

    def peak_memory_mib(self) -> dict[str, float]:
        values = gather([a.call("peak_memory_mib") for a in self._actors], 60, "peak memory")
        return {a.name: v for a, v in zip(self._actors, values, strict=True)}

    def nodes(self, gpus: bool) -> list[str]:
        """Ids of the living nodes that may hold actors, with `gpus` those that have any."""
        import ray

        kind = "GPU" if gpus else "CPU"
        return sorted(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(kind, 0) > 0)

    def dismiss(self, actors: Sequence[Actor]) -> None:
        """End actors that have done their work."""
        import ray

        for actor in actors:
            self._actors.remove(actor)
            ray.kill(actor.handle)

    def on_gpus(self) -> list[Actor]:
        """The actors that were given a GPU, or a part of one."""
        return [actor for actor in self._actors if actor.gpus > 0]

    def shutdown(self) -> None:
        """Leave nothing running, within a limit; safe to call twice and after a failure."""
        if self._ended:
            return
        self._ended = True
        self._remains.end([actor.handle for actor in self._actors])
        self._actors = []
        asked.gpus = []
        witness.forget()
        logs.shorten_all(self.log_folder)


def put(value: Any) -> Any:
    import ray

    return ray.put(value)


def gather(calls: Sequence[Call], timeout_seconds: float, what: str) -> list[Any]:
    """Results of the first reference of each call, in order. ActorError names who died, failed or is late: its actor has
    made no progress for `timeout_seconds`."""
    import ray

    lost_at = time.monotonic() + health.seconds_left()
    clocks = Clocks((call.actor.progress for call in calls), timeout_seconds)
    for call in calls:
        witness.watch(call.actor.info)
    # Of a future the main thread waits in Python, not in a call into Ray, which may hang where Ray does.
    pending = {call.ref.future(): call for call in calls}
    results: dict[Any, Any] = {}
    while pending:
        health.check()
        clocks.look(call.actor.progress for call in pending.values())
        left = {id(call): clocks.left(call.actor.progress) for call in pending.values()}
        until_lost = lost_at - time.monotonic()
        if late := [call for call in pending.values() if not left[id(call)] or until_lost <= 0]:
            raise ActorError(_late(late, clocks, timeout_seconds, what))
        ready, _ = wait(
            pending, timeout=min(*left.values(), until_lost, POLL_SECONDS, clocks.every), return_when=FIRST_COMPLETED
        )
        notices.tell()
        for future in ready:
            call = pending.pop(future)
            try:
                results[call.ref] = future.result()
            except ray.exceptions.RayError as error:
                raise explain(error, call, what) from None
    witness.all_well()
    return [results[call.ref] for call in calls]


def explain(error: Exception, call: Call, what: str) -> ApportionError:
    """One message with the actor, the cause and its last log lines."""
    import ray

    actor = call.actor
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, ApportionError):
            return cause
        if isinstance(cause, OSError) and cause.errno == 28:
            return CheckpointError(f"{actor.name}: no space left on the device while in {what}: {cause}")
        trace = str(error).replace("\\n", "\n")  # a KeyError shows its text as a literal
        lines = "\n".join(f"    {line}" for line in trace.rstrip().splitlines()[-12:])
        if isinstance(cause, ray.exceptions.TaskCancelledError):  # what Ray makes of a KeyboardInterrupt
            return ActorError(f"{actor.name}: {call.method} raised KeyboardInterrupt in {what}\n{lines}")
        return ActorError(f"{actor.name}: {call.method} failed in {what}: {type(cause).__name__}: {cause}\n{lines}")
    if getattr(error, "actor_init_failed", False):
        return _not_made(str(error).rstrip(), actor, what)
    if lost_node(error):
        return ActorError(
            f"Ray's node of {actor.name}{_where(actor)} died in {what} ({call.method}), and the actor with it: "
            f"{useful_words(str(error))}; look for the cause in that node's raylet logs and in dmesg"
        )
    cause = cause_of_death(error, witness.status(actor.info), witness.killed_for_memory(actor.info))
    return ActorError(f"{actor.name}{_where(actor)} died in {what} ({call.method}): {cause}{_last_lines(actor)}")


def _not_made(text: str, actor: Actor, what: str) -> ApportionError:
    """Of what a constructor raised Ray keeps the text alone; one of the project's own errors becomes itself again."""
    own = list(_OWN_ERROR.finditer(text))
    if own:
        return getattr(errors, own[-1][1])(text[own[-1].end() :])
    lines = text.splitlines()
    shown = [*lines[-12:], f"the end of {actor.log}:", *tail(actor.log).splitlines()]
    return ActorError(
        f"{actor.name}: could not be made in {what}: {lines[-1]}\n" + "\n".join(f"    {line}" for line in shown)
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts handlers of its own in place when it starts, with which a polite kill ends the process at once, untidied."""
    own = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in own.items():
                if handler is not None:
                    signal.signal(number, handler)


def _late(calls: list[Call], clocks: Clocks, seconds: float, what: str) -> str:
    names, missing = [], "answer within"
    for call in calls:
        count, did = clocks.count(call.actor.progress), call.method
        if count is not None:
            did, missing = f"{did}; {count.done:,} {count.unit} before", "progress for"
        names.append(f"{call.actor.name}{_where(call.actor)} ({did})")
    first = _last_lines(calls[0].actor)
    lacking = asked.lacking() if what == STARTING else None
    if lacking is not None:
        waited = f"no answer within {seconds:.0f} s from {', '.join(names)}"
        return f"{what}: {waited}: {lacking}; lower cluster.gpus_per_*, or add nodes"
    settings = {STARTING: "start_timeout_seconds", DOWNLOADING: "download_timeout_seconds"}
    setting = f"cluster.{settings.get(what, 'call_timeout_seconds')}"
    return f"{what}: no {missing} {seconds:.0f} s from {', '.join(names)}; raise {setting} if it is only slow{first}"


def _where(actor: Actor) -> str:
    return f" (pid {actor.info.pid} on {actor.info.host})" if actor.info else ""


def _last_lines(actor: Actor) -> str:
    lines = tail(actor.log)
    if not lines:
        return f"; its log would be {actor.log}"
    return f"; last lines of {actor.log}:\n" + "\n".join(f"    {line}" for line in lines.splitlines())


def python_path(cls: type) -> str:
    """What an actor must find before it can say anything: its own class, where that is not installed; and what the
    driver was given in PYTHONPATH. It goes before what is installed."""
    top = sys.modules[cls.__module__.partition(".")[0]]
    file = Path(getattr(top, "__file__", None) or "")
    root = str(file.parent.parent if hasattr(top, "__path__") else file.parent)
    needed = [root] if root in _own_folders() else []
    entries = [*needed, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(e for e in entries if e))


def module_folders() -> str:
    """Where the driver finds the user's own modules, for `process.find_user_modules`."""
    return os.pathsep.join(dict.fromkeys([*_own_folders(), os.getcwd()]))


def _own_folders() -> list[str]:
    """The driver's path without what belongs to the Python installation: a worker has its own."""
    installed = tuple(os.path.join(os.path.realpath(p), "") for p in (sys.prefix, sys.base_prefix))
    return [p for p in sys.path if os.path.isabs(p) and not os.path.realpath(p).startswith(installed)]
