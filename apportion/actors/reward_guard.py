"""Ends a reward actor in which a user's function keeps the interpreter, with a line that says so.

Such code (a pattern that backtracks, C code that holds the lock) lets no other thread run, so no time limit inside the
process is noticed. A child that hears nothing any more says why and kills the process: its log ends with that line.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

BEAT_SECONDS = 1.0
GRACE_SECONDS = 30.0  # past the longest limit
SECOND_CHANCE_SECONDS = 5.0  # both processes may have been paused


class InterpreterGuard:
    """While entered, this process is killed if none of its threads could run for `seconds`. Enter it on one thread only."""

    def __init__(self, functions: Sequence[str], seconds: float) -> None:
        self._functions, self._seconds = ", ".join(functions), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()

    def __enter__(self) -> InterpreterGuard:
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._over.clear()
        self._connection.send(True)
        self._beats = threading.Thread(target=self._beat, name="reward-guard", daemon=True)
        self._beats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._beats.join()

    def _start(self) -> None:
        # What the kernel's signal runs writes every thread's lines, whoever has the interpreter.
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        self._connection, there = multiprocessing.Pipe()
        arguments = [str(there.fileno()), str(os.getpid()), str(self._seconds), self._functions]
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, *arguments], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
            )

    def _beat(self) -> None:
        try:
            while not self._over.wait(BEAT_SECONDS):
                self._connection.send(True)
            self._connection.send(False)
        except BrokenPipeError:
            print(
                "reward guard: its process is gone, a function that keeps the interpreter is not ended", file=sys.stderr
            )


def watch(connection: Connection, process: int, seconds: float, functions: str) -> None:
    """Kill `process` where it is to be heard from (True was the last it said) and is not, for `seconds`."""
    heard = False
    while True:
        if connection.poll(seconds if heard else None) or connection.poll(SECOND_CHANCE_SECONDS):
            try:
                heard = connection.recv()
            except EOFError:
                return
            continue
        os.kill(process, signal.SIGUSR2)
        time.sleep(0.5)  # for the lines above to be written
        print(
            f"reward functions {functions}: one of them kept the interpreter for {seconds:g} s, where no time limit can "
            "interrupt it (its line is above); give it a process of its own or a limit inside, e.g. for patterns",
            file=sys.stderr,
            flush=True,
        )
        os.kill(process, signal.SIGKILL)
        return


if __name__ == "__main__":
    watch(Connection(int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
