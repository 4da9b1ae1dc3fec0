"""Runs the stages that a recipe asks for before itself, each in a process of its own, as if typed by hand."""

from __future__ import annotations

import subprocess
import sys

from apportion.conf.before import Stage, done, stages
from apportion.conf.schema import Config
from apportion.edges import terminated_as_interrupt
from apportion.platform.errors import ApportionError

STOP_SECONDS = 60.0  # that an interrupted stage has to stop its actors


def run_before(config: Config) -> None:
    """What is done already is not done again. ApportionError where a stage fails."""
    if config.resume is not None:
        return
    for stage in stages(config):
        if not done(stage, config.runs_folder):
            _run(stage, config.runs_folder)


def _run(stage: Stage, runs_folder: str) -> None:
    words = [*stage.words, f"runs_folder={runs_folder}"]
    print(f"first: apportion {' '.join(words)}", flush=True)
    with terminated_as_interrupt():
        process = subprocess.Popen([sys.executable, "-m", "apportion", *words])
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()  # a kill of this process alone has not reached it
            process.wait(STOP_SECONDS)
            raise
    if code:
        raise ApportionError(
            f"before: `apportion {stage.words[0]} run_name={stage.run_name} ...` ended with exit code {code}; what it said "
            "stands above"
        )
