"""Stages that a recipe runs before itself (`before`): each a line as one would type it after `apportion`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from apportion.conf.preference_schema import STAGES
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError

COMMANDS = tuple(name.replace("_", "-") for name in STAGES)


@dataclass(frozen=True)
class Stage:
    words: list[str]  # command and overrides
    run_name: str


def stages(config: Config) -> list[Stage]:
    """ConfigError for a line that is no stage with a run's name."""
    found = []
    for line in config.before:
        words = shlex.split(line)
        if not words or words[0] not in COMMANDS:
            raise ConfigError(f"before: got {line!r}, expected it to begin with one of {', '.join(COMMANDS)}")
        names = [word.partition("=")[2] for word in words[1:] if word.startswith("run_name=")]
        if len(names) != 1 or not names[0]:
            raise ConfigError(f"before: got {line!r}, expected one run_name=NAME in it, by which its result is found")
        found.append(Stage(words, names[0]))
    return found


def done(stage: Stage, runs_folder: str) -> bool:
    """Whether its run has a checkpoint. ConfigError for a folder that an unfinished stage left."""
    folder = Path(runs_folder) / stage.run_name
    if any((folder / "checkpoints").glob("step-*")):
        return True
    if folder.exists():
        raise ConfigError(
            f"before: {folder} is there without a checkpoint, left by a stage that did not end; expected a finished run "
            "or nothing: remove that folder"
        )
    return False
