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
    found: list[Stage] = []
    for line in config.before:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise ConfigError(f"before: got {line!r}, expected words as a shell reads them ({error})") from error
        if not words or words[0] not in COMMANDS:
            raise ConfigError(f"before: got {line!r}, expected it to begin with one of {', '.join(COMMANDS)}")
        names = [word.partition("=")[2] for word in words[1:] if word.startswith("run_name=")]
        if len(names) != 1 or not names[0]:
            raise ConfigError(f"before: got {line!r}, expected one run_name=NAME in it, by which its result is found")
        if names[0] in [stage.run_name for stage in found]:
            raise ConfigError(f"before: got run_name={names[0]} twice, expected a name of its own for each stage")
        found.append(Stage(words, names[0]))
    return found


def done(stage: Stage, runs_folder: str) -> bool:
    """Whether its run has ended with a model. ConfigError for a folder that an unfinished stage left."""
    folder = Path(runs_folder) / stage.run_name
    if not folder.exists():
        return False
    if (folder / "summary.json").is_file() and any((folder / "checkpoints").glob("step-*")):
        return True
    raise ConfigError(
        f"before: {folder} is of a stage that did not end, expected a finished run: apportion {stage.words[0]} "
        f"resume={folder}, or remove that folder"
    )
