"""Ready-made verifiers whose time limit must hold against code that keeps the interpreter.

A power without end (math-verify) or a pattern that backtracks never lets another thread of its process run, so no limit
inside that process is noticed. These verifiers are called in a child process, which is killed instead.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from typing import Any

from apportion.actors.reward_call import CallTimeout, Failure, RewardCall, failure_of
from apportion.actors.reward_child import READY
from apportion.actors.reward_sources import FunctionSource, RewardEntry
from apportion.data.verifiers import VERIFIERS

START_SECONDS = 120.0  # for a child to load its library
SHARE = 0.25  # of the time that is left, for one sample
MOST_LOST = 16  # children that one call may lose before the rest of its samples is given up


class ChildDied(Exception):
    """The child ended by itself."""


class VerifierSource(FunctionSource):
    """A ready-made verifier in a child process, started with the first call and kept for the next ones.

    All samples of a call go to the child in one message and answers come back one by one. `timeout_seconds` are for all
    of them together, and each gets at most a quarter of what is left (a sample alone, all of it). One that is late
    fails alone: its child is killed and a new one goes on with the next sample. Starting a child is not counted.
    """

    def __init__(self, name: str, verifier: str, entry: RewardEntry) -> None:
        super().__init__(name, VERIFIERS[verifier], entry)
        self._verifier = verifier
        self._child: _Child | None = None

    def close(self) -> None:
        super().close()
        self._end()

    def score(self, call: RewardCall) -> list[Any]:
        share = SHARE if len(call) > 1 else 1.0
        elements: list[Any] = []
        left, lost, asked = self.limit_seconds, 0, False
        for index in range(len(call)):
            if left <= 0 or lost == MOST_LOST:
                elements.append(self.not_called(lost))
                continue
            start = time.monotonic()
            try:
                if not asked:
                    self._ask(call, index)
                    asked, start = True, time.monotonic()
                assert self._child is not None
                elements.append(self._child.answer(left * share))
            except Exception as error:  # noqa: BLE001 - whatever became of the child is a failure of this sample
                elements.append(self._failure(error))
                self._end()
                lost, asked = lost + 1, False
            left -= time.monotonic() - start
        if left <= 0 or lost == MOST_LOST:
            self._end()  # it may still be busy with samples that were given up
        return elements

    def _ask(self, call: RewardCall, first: int) -> None:
        """Send the samples from `first` on, to a new child where there is none."""
        samples = [self._sample(call, index) for index in range(first, len(call))]
        if self._child is None or not self._child.alive:
            self._end()
            self._child = _Child(self._verifier)
        self._child.send((self.name, self.limit_seconds, samples))

    def _sample(self, call: RewardCall, index: int) -> dict[str, Any]:
        arguments = self._arguments(call.select([index]))
        return {name: value for name, value in arguments.items() if name in self._takes}

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, ChildDied):
            return Failure("died", f"{self.name}: {error}")
        return failure_of(error, self.name)

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """A Python of its own, not `multiprocessing`'s: that one would import the caller's main module once more."""

    def __init__(self, verifier: str) -> None:
        self._connection, there = multiprocessing.Pipe()
        command = [sys.executable, "-P", "-m", "apportion.actors.reward_child", str(there.fileno()), verifier]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with there:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[there.fileno()]
            )
        try:
            said = self.answer(START_SECONDS)
        except BaseException:
            self.end()
            raise
        assert said == READY

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except BrokenPipeError:
            raise self._death() from None

    def answer(self, seconds: float) -> Any:
        """What the child says next; CallTimeout after `seconds`, ChildDied where there is no child any more."""
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        raise CallTimeout(f"no answer within {seconds:.3g} s, its process is killed")

    def _death(self) -> ChildDied:
        self._process.wait()
        return ChildDied(f"its process ended with exit code {self._process.returncode}, expected an answer")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
