"""Runs the stages that a recipe asks for before itself, each in a process of its own, as if typed by hand."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from apportion.conf.before import Stage, done, keep_words, same_words, stages
from apportion.conf.schema import Config
from apportion.edges import terminated_as_interrupt
from apportion.platform.errors import ApportionError, ConfigError
from apportion.platform.known_secrets import redacted_text
from apportion.platform.messages import say
from apportion.platform.runs import never_began

STOP_SECONDS = 60.0  # that an interrupted stage has to stop its actors


def run_before(config: Config) -> None:
    """What is done already is not done again. ApportionError where a stage fails."""
    if config.resume is not None:
        return
    left = []
    for stage in stages(config):
        if not done(stage, config.runs_folder):
            left.append(stage)
        elif same_words(stage, config.runs_folder):
            say(f"reusing {Path(config.runs_folder) / stage.run_name}")
        else:
            say(
                f"reusing {Path(config.runs_folder) / stage.run_name}, which was started by hand: whether by the words of "
                "`before` is not known"
            )
    own = None if config.run_name is None else Path(config.runs_folder) / config.run_name
    if left and own is not None and own.exists() and not never_began(own):
        raise ConfigError(
            f"run_name: got {config.run_name!r}, which {config.runs_folder} already has; expected a new name"
        )
    for stage in left:
        _run(stage, config.runs_folder)


def _run(stage: Stage, runs_folder: str) -> None:
    words = [*stage.words, f"runs_folder={runs_folder}"]
    say(f"first: apportion {' '.join(redacted_text(word) for word in words)}")
    with terminated_as_interrupt():
        # In a session of its own it gets one signal, ours; a terminal's Ctrl-C would come twice and cut its tidying short.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "apportion", *words],
            start_new_session=True,
            preexec_fn=_ended_with(os.getpid()),
        )
        try:
            code = process.wait()  # each of its own waits has a limit
        except KeyboardInterrupt:
            _stop(process)
            raise
    if code:
        raise ApportionError(
            f"before: `apportion {stage.words[0]} run_name={stage.run_name} ...` ended with exit code {code}; what it said "
            "stands above"
        )
    keep_words(stage, runs_folder)


def _ended_with(parent: int) -> Callable[[], None] | None:
    """For a child to call: it is asked to end when this process is gone, even one that was killed outright. Linux alone
    has this; elsewhere the stage then runs to its end."""
    if not sys.platform.startswith("linux"):
        return None
    library, asked_when_parent_ends = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG of prctl(2)

    def ask() -> None:
        library.prctl(asked_when_parent_ends, signal.SIGTERM)
        if os.getppid() != parent:  # gone already, before it was asked
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
