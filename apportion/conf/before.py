"""Stages that a recipe runs before itself (`before`): each a line as one would type it after `apportion`."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from apportion.conf.preference_schema import STAGES
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError
from apportion.platform.files import write_text_atomically
from apportion.platform.foreign import read_json
from apportion.platform.known_secrets import redacted_text
from apportion.platform.messages import quoted
from apportion.platform.run_lock import is_held
from apportion.platform.runs import check_run_name, never_began

WORDS_FILE = "before.json"  # in the run's folder: what it was made by
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
        check_run_name(names[0])
        found.append(Stage(words, names[0]))
    return found


def done(stage: Stage, runs_folder: str) -> bool:
    """Whether its run has ended with a model. ConfigError for a folder that is in use, that an unfinished stage left, or
    that other words have made."""
    folder = Path(runs_folder) / stage.run_name
    if not folder.exists():
        return False
    if is_held(folder):
        raise ConfigError(
            f"before: {folder} is running in another process, expected a finished run: wait for it, or stop it"
        )
    if (folder / "summary.json").is_file() and any((folder / "checkpoints").glob("step-*")):
        _refuse_other_words(stage, folder)
        return True
    if never_began(folder):  # its run takes the folder over
        return False
    raise ConfigError(
        f"before: {folder} is of a stage that did not end, expected a finished run: apportion {stage.words[0]} "
        f"resume={folder}, or remove that folder"
    )


def keep_words(stage: Stage, runs_folder: str) -> None:
    """Leave in a finished run what it was made by, without secrets."""
    text = json.dumps({"words": _words(stage)}, indent=2)
    write_text_atomically(Path(runs_folder) / stage.run_name / WORDS_FILE, text + "\n")


def same_words(stage: Stage, runs_folder: str) -> bool:
    """Whether the run is known to be made by these words; one that was started by hand has none."""
    return (Path(runs_folder) / stage.run_name / WORDS_FILE).is_file()


def _refuse_other_words(stage: Stage, folder: Path) -> None:
    file = folder / WORDS_FILE
    if not file.is_file():
        return
    found, wanted = _kept_words(file), _words(stage)
    if found != wanted:
        differ = [word for word in [*found, *wanted] if (word in found) != (word in wanted)]
        raise ConfigError(
            f"before: {folder} was made by other words (these differ: {' '.join(differ) or 'their order'}), expected a run "
            "of this line: give the line another run_name, or remove that folder"
        )


def _kept_words(file: Path) -> list[str]:
    try:
        read = read_json(file)
    except ValueError as error:
        raise ConfigError(f"before: {file}: cannot be read ({error}), expected the words of a stage") from error
    words = read.get("words") if isinstance(read, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"before: {file}: got {quoted(read)}, expected the words of a stage: remove that folder")
    return words


def _words(stage: Stage) -> list[str]:
    return [redacted_text(word) for word in stage.words]
