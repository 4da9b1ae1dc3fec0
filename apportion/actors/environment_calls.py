"""Calling environments with a time limit: synchronous ones on threads, asynchronous ones on an event loop.

A limit counts from when a call begins to run, so that a short pool does not make calls late. Python cannot stop a
thread: a call past its limit is left behind in its daemon thread, and past `MAX_HUNG` of them nothing more is started.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

MAX_HUNG = 64  # threads left behind in one process
GRACE_SECONDS = 1.0  # for a coroutine to notice that it was cancelled


class StepTimeout(Exception):
    """An environment did not answer within its limit."""


@dataclass
class _Job:
    call: Callable[[], Any]
    started: float = 0.0
    result: Any = None  # or the exception it ended with
    done: bool = False
    abandoned: bool = False


@dataclass
class _Round:
    """Calls made together: those still to begin, those under way, and how many have no result yet."""

    waiting: deque[_Job]
    running: list[_Job]
    missing: int


class ThreadPool:
    """Runs functions side by side, each within a limit of its own."""

    def __init__(self, threads: int, limit: float, max_hung: int = MAX_HUNG) -> None:
        self._threads, self._limit, self._max_hung = threads, limit, max_hung
        self._changed = threading.Condition()
        self._hung: list[_Job] = []

    @property
    def hung(self) -> int:
        """Calls given up that are still busy."""
        with self._changed:
            self._hung = [job for job in self._hung if not job.done]
            return len(self._hung)

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each function returned, or the exception that it ended with (StepTimeout past the limit)."""
        jobs = [_Job(function) for function in functions]
        round_ = _Round(deque(jobs), [], len(jobs))
        for _ in range(min(self._threads, len(jobs))):
            self._thread(round_)
        with self._changed:
            while round_.missing:
                # A call that begins later has a later limit, so none is overslept.
                left = [job.started + self._limit - time.monotonic() for job in round_.running]
                self._changed.wait(max(0.0, min([*left, self._limit])))
                self._leave_late_ones(round_)
        return [job.result for job in jobs]

    def _thread(self, round_: _Round) -> None:
        threading.Thread(target=self._work, args=(round_,), name="environment", daemon=True).start()

    def _leave_late_ones(self, round_: _Round) -> None:
        now = time.monotonic()
        for job in [job for job in round_.running if now >= job.started + self._limit]:
            job.abandoned = True
            job.result = StepTimeout(f"no answer within {self._limit:g} s, its thread is left behind")
            self._hung.append(job)
            round_.running.remove(job)
            round_.missing -= 1
            self._thread(round_)  # in the place of the one that is busy

    def _work(self, round_: _Round) -> None:
        while (job := self._next(round_)) is not None:
            try:
                result: Any = job.call()
            except BaseException as error:  # noqa: BLE001 - carried to the caller, SystemExit of a user's class too
                result = error
            with self._changed:
                job.done = True
                if job.abandoned:
                    return
                job.result = result
                round_.running.remove(job)
                round_.missing -= 1
                if not round_.missing:
                    self._changed.notify_all()

    def _next(self, round_: _Round) -> _Job | None:
        with self._changed:
            if self.hung >= self._max_hung:
                for job in round_.waiting:
                    text = f"not called: {self._max_hung} earlier calls are still busy past their time limit"
                    job.result = StepTimeout(text)
                round_.missing -= len(round_.waiting)
                round_.waiting.clear()
                self._changed.notify_all()
            if not round_.waiting:
                return None
            job = round_.waiting.popleft()
            job.started = time.monotonic()
            round_.running.append(job)
            return job


class EventLoop:
    """Runs coroutines side by side on a loop in a thread, so that sessions which environments hold stay usable."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """What each coroutine gave, or the exception that it ended with (StepTimeout past the limit)."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="environment-loop", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(self._all(coroutines), self._loop)
        try:
            return future.result(self._limit + GRACE_SECONDS)
        except TimeoutError:
            self._loop = None  # something blocks it: whoever waits on it is lost, later calls get a fresh one
            text = f"no answer within {self._limit:g} s; one of the asynchronous environments blocks the event loop"
            return [StepTimeout(text) for _ in coroutines]

    async def _all(self, coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        return await asyncio.gather(*map(self._one, coroutines), return_exceptions=True)

    async def _one(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        scope = asyncio.timeout(self._limit)
        try:
            async with scope:
                return await coroutine
        except TimeoutError:
            if scope.expired():
                raise StepTimeout(f"no answer within {self._limit:g} s") from None
            raise
