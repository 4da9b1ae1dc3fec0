"""One call of a reward source, and calling a user's function with a time limit, which holds for what lets other threads run.

What keeps the interpreter is a matter for `reward_process` (ready-made verifiers) and `reward_guard` (users' functions).
Python cannot stop a thread. A function that blocks past its limit is left behind in its thread (a daemon: it does not
keep the process alive) and the next call gets a fresh one. Threads that are still busy are counted; past `max_hung` the
function is not called any more, as each of them may hold memory, a lock or a core.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from apportion.data.columns import value_at
from apportion.platform.known_secrets import redacted_text

ASYNC_GRACE_SECONDS = 1.0  # for a coroutine to notice that it was cancelled
TRACEBACK_CHARACTERS = 4000


@dataclass
class Failure:
    """Why one sample has no reward."""

    reason: str  # raised, timeout, hung, died, service, wrong_length, wrong_type, not_finite, misplaced, too_long
    text: str  # one line, or the traceback where something raised


@dataclass
class RewardCall:
    """Samples to be rewarded, in the form that TRL's reward functions take; every list has one element a sample."""

    prompts: list[Any]  # text or messages, as the user wrote them
    completions: list[Any]  # text, or [{"role": "assistant", "content": text}] where the prompt is messages
    columns: dict[str, list[Any]]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    prompt_endings: list[str] | None = None  # the text of each prompt's last tokens; None: no tokenizer is known

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, indices: Sequence[int]) -> RewardCall:
        return RewardCall(
            [self.prompts[i] for i in indices],
            [self.completions[i] for i in indices],
            {name: [values[i] for i in indices] for name, values in self.columns.items()},
            [self.prompt_ids[i] for i in indices],
            [self.completion_ids[i] for i in indices],
            None if self.prompt_endings is None else [self.prompt_endings[i] for i in indices],
        )

    def with_columns(self, paths: Mapping[str, str]) -> RewardCall:
        """The same samples with more columns: of each name, the value at its path in the columns that are there."""
        if not paths:
            return self
        rows = [{name: values[i] for name, values in self.columns.items()} for i in range(len(self))]
        more = {name: [value_at(row, path) for row in rows] for name, path in paths.items()}
        return replace(self, columns=self.columns | more)


class CallTimeout(Exception):
    """The function did not return within its limit."""


class TooManyHung(Exception):
    """Too many earlier calls of the function are still busy."""


class UsersExit(Exception):
    """A user's code raised `error`, which would end this process: KeyboardInterrupt, SystemExit or another that is no
    Exception. Here it is a failure like any other."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def failure_of(error: BaseException, name: str) -> Failure:
    """What is told of an error in reward source `name`."""
    if isinstance(error, CallTimeout):
        return Failure("timeout", f"{name}: {error}")
    if isinstance(error, TooManyHung):
        return Failure("hung", f"{name}: {error}")
    if isinstance(error, UsersExit):
        error = error.error
    text = "".join(traceback.format_exception(type(error), error, _users_frames(error)))
    text = redacted_text(text)  # before it is shortened: half a secret is no known one
    return Failure("raised", f"{name}:\n{text[-TRACEBACK_CHARACTERS:]}")


def _users_frames(error: BaseException) -> TracebackType | None:
    """The frames below the machinery that calls a function; all of them where the call itself was refused."""
    frames = below = error.__traceback__
    while frames is not None:
        if Path(frames.tb_frame.f_code.co_filename).name.startswith("reward_") and _is_ours(frames):
            below = frames.tb_next
        frames = frames.tb_next
    return below or error.__traceback__


def _is_ours(frames: TracebackType) -> bool:
    return Path(frames.tb_frame.f_code.co_filename).parent == Path(__file__).parent


class _Worker:
    """A thread with an event loop of its own, doing one job after another until it is left behind."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], float, Future[Any]] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._work, name=f"reward-{name}", daemon=True)
        self.thread.start()

    def submit(self, function: Callable[[], Any], limit: float) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((function, limit, future))
        return future

    def leave(self) -> None:
        """The thread ends once its current job does."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, limit, future = job
            try:
                future.set_result(self._run(function, limit))
            except Exception as error:  # noqa: BLE001 - carried to the caller
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - of the user's function: nobody interrupts this thread
                future.set_exception(UsersExit(error))
        if self._loop is not None:
            self._loop.close()

    def _run(self, function: Callable[[], Any], limit: float) -> Any:
        deadline = time.monotonic() + limit
        result = function()
        if not inspect.isawaitable(result):
            return result
        if self._loop is None:
            self._loop = asyncio.new_event_loop()  # kept, so that sessions a user's function holds on to stay usable
        return self._loop.run_until_complete(within(result, deadline - time.monotonic(), limit))


async def within(awaitable: Any, seconds: float, limit: float) -> Any:
    """What the awaitable gives, or CallTimeout after `seconds` (of the `limit` that the message names)."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            return await awaitable
    except TimeoutError:
        if scope.expired():
            raise CallTimeout(f"no answer within {limit:g} s") from None
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # by whoever awaits this
        raise UsersExit(error) from None


class LimitedCaller:
    """Calls one function, sync or async, one call at a time and each within a limit."""

    def __init__(self, name: str, is_async: bool = False, max_hung: int = 8) -> None:
        self._name, self._max_hung = name, max_hung
        self._grace = ASYNC_GRACE_SECONDS if is_async else 0.0
        self._worker: _Worker | None = None
        self._left: list[_Worker] = []

    @property
    def hung(self) -> int:
        """Calls that were given up and are still busy."""
        self._left = [worker for worker in self._left if worker.thread.is_alive()]
        return len(self._left)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.leave()
            self._worker = None

    def call(self, function: Callable[[], Any], limit: float) -> Any:
        """What `function` returns (or its awaitable gives), or raises; CallTimeout after `limit` seconds."""
        if self.hung >= self._max_hung:
            raise TooManyHung(
                f"{self._max_hung} earlier calls are still busy past their time limit, so it is not called any more; "
                "give the function a time limit of its own, or a longer timeout_seconds"
            )
        if self._worker is None:
            self._worker = _Worker(self._name)
        future = self._worker.submit(function, limit)
        try:
            return future.result(limit + self._grace)
        except FutureTimeoutError:
            if future.done():  # the function's own TimeoutError, or an answer in the last moment
                return future.result()
            self._worker.leave()
            self._left.append(self._worker)
            self._worker = None
            raise CallTimeout(f"no answer within {limit:g} s, its thread is left behind") from None
