"""Runs a tokenizer's chat template within limits of time and memory: in a process of its own.

Nothing less holds: a signal reaches the main thread alone, and neither a loop without output nor a power of large numbers
gives the interpreter back. One process serves all renderings of this one; it starts with the first.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from apportion.data.template_child import LATE, OVERRUN, READY, REFUSED, refusal

LIMIT_SECONDS = 10.0  # of one rendering; a long conversation with many tools takes milliseconds
GRACE_SECONDS = 20.0  # for the process to say that its worker was late
START_SECONDS = 120.0  # for the process to import the library
# Names of transformers' `apply_chat_template`: what the caller sets, and what is about tokens alone.
_SET = ("self", "conversation", "tools", "add_generation_prompt", "tokenize", "continue_final_message",
        "return_assistant_tokens_mask")  # fmt: skip
_ABOUT_TOKENS = ("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs")
# What the process is started with: no secret of this process, and no mark by which a run's processes are found.
_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME")


class Refused(Exception):
    """The template raised an error; its text is one line."""


class Overrun(Exception):
    """The template went past a limit; the text says which, after "the chat template"."""


def apply(tokenizer: Any, messages: Any, tools: Any, asks: bool, kwargs: Mapping[str, Any]) -> str:
    """What the tokenizer's chat template writes of messages; Refused or Overrun where it does not come to an end."""
    try:
        if not _is_jinja(tokenizer):
            return str(
                tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=asks, tokenize=False, **kwargs
                )
            )
        request = pickle.dumps(_arguments(tokenizer, messages, tools, asks, dict(kwargs)))
    except Exception as error:
        said = f"a value cannot be given to it: {error}" if isinstance(error, pickle.PicklingError) else refusal(error)
        if said is None:
            raise
        raise Refused(said) from error
    with _lock:
        return _child_of_this_process().render(request)


def _is_jinja(tokenizer: Any) -> bool:
    """Whether transformers renders for it. A class that has another way runs in this process: it is a library's, or of the
    model's own code, which only runs where the user trusts it."""
    from transformers import PreTrainedTokenizerBase

    return getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template


def _arguments(tokenizer: Any, messages: Any, tools: Any, asks: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `render_jinja_template` takes, as `apply_chat_template` gives it."""
    taken = [name for name in _SET if name in kwargs]
    if taken:
        raise TypeError(f"chat_template_kwargs: got {taken[0]}, expected only names that the template itself reads")
    template = tokenizer.get_chat_template(kwargs.pop("chat_template", None), tools)
    known = {name: value for name, value in kwargs.items() if name not in _ABOUT_TOKENS}
    return {
        **tokenizer.special_tokens_map, **known, "conversations": [messages], "tools": tools, "chat_template": template,
        "add_generation_prompt": asks,
    }  # fmt: skip


class _Child:
    def __init__(self) -> None:
        self._connection, there = multiprocessing.Pipe()
        command = [sys.executable, "-P", "-m", "apportion.data.template_child", str(there.fileno())]
        environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # it forks, and so has one thread
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        with there:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, cwd="/", pass_fds=[there.fileno()],
                start_new_session=True,
            )  # fmt: skip
        try:
            said = self._next(START_SECONDS)
        except Overrun as error:
            self.end()
            raise ChildProcessError(f"the process for chat templates did not start: it {error}") from None
        except BaseException:
            self.end()
            raise
        assert said == READY

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def render(self, request: bytes) -> str:
        try:
            try:
                self._connection.send_bytes(f"{LIMIT_SECONDS:g} ".encode() + request)
            except BrokenPipeError:
                raise self._death() from None
            answer = self._next(LIMIT_SECONDS + GRACE_SECONDS)
        except BaseException:  # an interrupt too: the next answer would be this one's
            self.end()
            raise
        kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
        if kind == LATE:
            raise Overrun(f"took more than {LIMIT_SECONDS:g} s")
        if kind == OVERRUN:
            raise Overrun(text)
        if kind == REFUSED:
            raise Refused(text)
        return text

    def _next(self, seconds: float) -> bytes:
        try:
            if self._connection.poll(seconds):
                return self._connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        raise Overrun(f"took more than {seconds:g} s")

    def _death(self) -> Overrun:
        code = self._process.wait()
        number = -code if code < 0 else code - 128
        return Overrun(f"ended its process ({f'signal {number}' if number > 0 else f'exit code {code}'})")

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()


_lock = threading.Lock()
_child: _Child | None = None


def _child_of_this_process() -> _Child:
    global _child
    if _child is None or not _child.alive:
        _child = _Child()
    return _child


def _forget() -> None:
    """In a forked child: the process answers the parent, and the thread that held the lock is not there."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


@atexit.register
def _end() -> None:
    if _child is not None and _child.alive:
        _child.end()
