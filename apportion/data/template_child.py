"""The process in which chat templates run, within limits of time and memory. `templates` starts it.

A template comes with a model, and is a program: it may loop without end, or ask for more memory than there is. This
process imports what rendering needs, once, and forks a worker; the kernel ends a worker that is late, and the next one is
there at once. Neither has the secrets of the program that renders, and what comes back from them is text alone.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

MEMORY_GIB = 2  # of one rendering; the largest row that is read takes a few hundred MiB
READY, TEXT, REFUSED, OVERRUN, LATE = b"ready", b"t", b"r", b"o", b"l"  # what an answer begins with
_RENEW = 100  # the exit code of a worker that grew large
# A template repeats texts of the row and adds its own; one that writes more does not show the row.
_LEAST_CHARACTERS, _TIMES = 2**20, 16


def main(connection: Connection) -> int:
    """Have a worker that answers requests until the other end is closed; say LATE for one that was ended."""
    from transformers.utils.chat_template_utils import render_jinja_template

    connection.send_bytes(READY)
    while True:
        worker = os.fork()
        if not worker:
            os._exit(_work(connection, render_jinja_template))
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if code == -signal.SIGALRM:
            connection.send_bytes(LATE)
        elif code != _RENEW:
            return code if code >= 0 else 128 - code  # as a shell says it


def _work(connection: Connection, render: Any) -> int:
    try:
        _limit_memory()
        while True:
            try:
                seconds, _, request = connection.recv_bytes().partition(b" ")
            except EOFError:
                return 0
            signal.setitimer(signal.ITIMER_REAL, float(seconds))
            answer = _answer(render, request)
            signal.setitimer(signal.ITIMER_REAL, 0)  # before the answer: one that is said is not LATE as well
            connection.send_bytes(answer)
            if answer.startswith(OVERRUN):
                return _RENEW
    except BrokenPipeError:
        return 0
    except BaseException:  # noqa: BLE001 - the process is a fork: nothing may go on above
        traceback.print_exc()
        return 1


def _answer(render: Any, request: bytes) -> bytes:
    try:
        text = str(render(**pickle.loads(request))[0][0])
        most = _LEAST_CHARACTERS + _TIMES * len(request)
        if len(text) > most:
            return OVERRUN + f"wrote {len(text):,} characters for this row, more than {most:,}".encode()
        return TEXT + text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return OVERRUN + f"took more than {MEMORY_GIB} GiB of memory".encode()
    except Exception as error:
        said = refusal(error)
        if said is None:
            raise
        return REFUSED + said.encode("utf-8", "replace")


def refusal(error: Exception) -> str | None:
    """What a template raised, in one line; None where it was not the template. One that meets a missing key, divides by
    zero or calls itself without end fails as a program does, without a special error."""
    from jinja2 import TemplateError

    kinds = (
        TemplateError, SyntaxError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError,
    )  # fmt: skip
    if not isinstance(error, kinds):
        return None
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    line = next(iter(said.splitlines()), "") or type(error).__name__
    return f"{line[:500]}{_line_of_template(error)}"


def _line_of_template(error: BaseException) -> str:
    """`, line 3 of the template`, or nothing where that is not known, or where the template itself refuses."""
    from jinja2 import TemplateError, TemplateSyntaxError

    if type(error) is TemplateError:  # of `raise_exception`
        return ""
    line = error.lineno if isinstance(error, TemplateSyntaxError) else None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<template>":
            line = number
    return "" if line is None else f", line {line} of the template"


def _limit_memory() -> None:
    """Python raises MemoryError past MEMORY_GIB more than this process has now. Linux alone has this."""
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + MEMORY_GIB * 2**30
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    sys.exit(main(Connection(int(sys.argv[1]))))
