"""Calling environments with a time limit: synchronous ones on threads, asynchronous ones on an event loop.

A limit counts from when a call begins to run, so that neither a short pool nor a busy loop makes calls late that have
not begun. Python cannot stop a thread: a call past its limit is left behind in its daemon thread, and past `MAX_HUNG` of
them nothing more is started.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

MAX_HUNG = 64  # threads left behind in one process
MAX_BLOCKED = 2  # event loops given up in one round of calls, each of which costs the limit
GRACE_SECONDS = 1.0  # for a coroutine to notice that it was cancelled


class StepTimeout(Exception):
    """An environment did not answer within its limit."""


@dataclass(eq=False)  # two jobs are never the same, and finding one among thousands compares no results
class _Job:
    call: Callable[[], Any]
    started: float = 0.0
    task: asyncio.Task[None] | None = None  # of a coroutine
    result: Any = None  # or the exception it ended with
    done: bool = False
    abandoned: bool = False


@dataclass
class _Round:
    """Calls made together: those still to begin, those under way, and how many have no result yet."""

    waiting: deque[_Job]
    running: list[_Job]
    missing: int

    @staticmethod
    def of(jobs: Sequence[_Job]) -> _Round:
        return _Round(deque(jobs), [], len(jobs))

    def begin(self, job: _Job) -> None:
        self.waiting.remove(job)
        job.started = time.monotonic()
        self.running.append(job)

    def end(self, job: _Job, result: Any) -> None:
        """What a call gave, unless it was given up before."""
        job.done = True
        if not job.abandoned:
            job.result = result
            self.running.remove(job)
            self.missing -= 1

    def give_up(self, job: _Job, why: str) -> None:
        job.abandoned = True
        job.result = StepTimeout(why)
        self.running.remove(job)
        self.missing -= 1

    def refuse_waiting(self, why: str) -> None:
        for job in self.waiting:
            job.result = StepTimeout(why)
        self.missing -= len(self.waiting)
        self.waiting.clear()


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
        round_ = _Round.of(jobs)
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
            round_.give_up(job, f"no answer within {self._limit:g} s, its thread is left behind")
            self._hung.append(job)
            self._thread(round_)  # in the place of the one that is busy

    def _work(self, round_: _Round) -> None:
        while (job := self._next(round_)) is not None:
            try:
                result: Any = job.call()
            except BaseException as error:  # noqa: BLE001 - carried to the caller, SystemExit of a user's class too
                result = error
            with self._changed:
                round_.end(job, result)
                if job.abandoned:
                    return
                if not round_.missing:
                    self._changed.notify_all()

    def _next(self, round_: _Round) -> _Job | None:
        with self._changed:
            if self.hung >= self._max_hung:
                round_.refuse_waiting(
                    f"not called: {self._max_hung} earlier calls are still busy past their time limit"
                )
                self._changed.notify_all()
            if not round_.waiting:
                return None
            job = round_.waiting[0]
            round_.begin(job)
            return job


class EventLoop:
    """Runs coroutines side by side on a loop in a thread, so that sessions which environments hold stay usable."""

    def __init__(self, limit: float, threads: int) -> None:
        """Calls may take as long together as on so many `threads` of a pool, twice over."""
        self._limit, self._threads = limit, threads
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, functions: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """What each coroutine gave, or the exception that it ended with (StepTimeout past the limit).

        Only one that has begun and is past its own limit is late. One that blocks the loop makes all that began before it
        late; those that have not begun go on with a fresh loop.
        """
        jobs = [_Job(function) for function in functions]
        round_ = _Round.of(jobs)
        deadline = time.monotonic() + 2 * (GRACE_SECONDS + self._limit * ceil(len(jobs) / self._threads))
        for _ in range(MAX_BLOCKED):
            self._go_on(round_, deadline)
            if not round_.missing:
                break
        with self._changed:
            round_.refuse_waiting(
                "not called: asynchronous environments blocked the event loop, or kept it busy, for too long"
            )
        return [job.result for job in jobs]

    def _go_on(self, round_: _Round, deadline: float) -> None:
        """Until each call has a result, or the loop is blocked and only those are left that have not begun."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="environment-loop", daemon=True).start()
        pulse = _Pulse(self._loop)
        self._loop.call_soon_threadsafe(self._create, self._loop, round_, list(round_.waiting))
        with self._changed:
            while round_.missing:
                self._changed.wait(self._limit / 10)
                spent = time.monotonic() >= deadline
                if round_.missing and (spent or pulse.still_seconds() >= self._limit):
                    self._loop = None  # whoever waits on it is lost, later calls get a fresh one
                    self._blame(round_, pulse.task)
                    return
                self._leave_late_ones(round_)

    def _create(self, loop: asyncio.AbstractEventLoop, round_: _Round, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            job.task = loop.create_task(self._one(job, round_))

    async def _one(self, job: _Job, round_: _Round) -> None:
        with self._changed:
            if job not in round_.waiting:
                return  # this loop was given up, and another has begun it
            round_.begin(job)
        scope = asyncio.timeout(self._limit)
        try:
            async with scope:
                result: Any = await job.call()
        except BaseException as error:  # noqa: BLE001 - carried to the caller; a SystemExit would end the loop of all
            late = isinstance(error, TimeoutError) and scope.expired()
            result = StepTimeout(f"no answer within {self._limit:g} s") if late else error
        with self._changed:
            round_.end(job, result)
            if not round_.missing:
                self._changed.notify_all()

    def _blame(self, round_: _Round, blocker: asyncio.Task[Any] | None) -> None:
        for job in list(round_.running):
            who = "it" if job.task is blocker else "another asynchronous environment"
            round_.give_up(job, f"no answer within {self._limit:g} s; {who} blocks the event loop")

    def _leave_late_ones(self, round_: _Round) -> None:
        """The loop itself ends what is late; this is for what goes on though it was cancelled."""
        now = time.monotonic()
        for job in [job for job in round_.running if now >= job.started + self._limit + GRACE_SECONDS]:
            round_.give_up(job, f"no answer within {self._limit:g} s")


class _Pulse:
    """Tells a loop that is busy from one that is blocked: for how long neither a turn of it nor a task has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._beats = 0  # turns of the loop, at most one for each time that was asked
        self._last, self._since = (-1, self.task), time.monotonic()

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The one that holds the loop now."""
        return asyncio.current_task(self._loop)

    def still_seconds(self) -> float:
        seen, now = (self._beats, self.task), time.monotonic()
        if seen != self._last:
            self._last, self._since = seen, now
        self._loop.call_soon_threadsafe(self._beat)
        return now - self._since

    def _beat(self) -> None:
        self._beats += 1
