"""Runs that the command line names: the configuration each keeps, and what to say where there is none."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.conf.arguments import plain
from apportion.conf.checks import leaves
from apportion.platform.errors import ConfigError, nearest
from apportion.platform.foreign import LARGEST_YAML, checked_yaml, read_text, yaml_problem
from apportion.platform.known_secrets import redacted_text
from apportion.platform.messages import quoted, shortened
from apportion.platform.run_state import is_number
from apportion.platform.secret_shapes import REDACTED
from apportion.platform.signature import unsigned_because

if TYPE_CHECKING:
    from apportion.conf.preference_schema import PreferenceConfig
    from apportion.conf.schema import Config
    from apportion.platform.checkpoint import Checkpoint

SAVED_NAME = "config.yaml"  # what a run's folder keeps its configuration under
_OF_HYDRA = ("hydra", "defaults")  # keys that Hydra would take as orders: what to load, to set and to call
_SHOWN = 20  # values of a foreign configuration that one line names


@dataclass(frozen=True)
class SavedRun:
    """A run's configuration as its folder keeps it. A command that takes it up calls `refuse_foreign` before it imports or
    starts anything that the configuration names."""

    file: Path
    values: dict[str, Any]  # for omegaconf
    foreign: str | None  # why it is not known as this user's own run in this place; None where it is

    def refuse_foreign(self, resolved: dict[str, Any], words: list[str], before: bool = False) -> None:
        """ConfigError for a foreign run whose configuration would run or contact something, unless the user trusts it.
        `resolved` is the composed configuration, `words` those of the command line: what they say themselves is the
        user's own. `before`: the command runs the stages of `before`."""
        if self.foreign is None or resolved.get("trust_run"):
            return
        from apportion.conf.trust import uses  # not for --help

        found = [use for use in uses(resolved, before) if not use.typed(words)]
        if found:
            named = [f"{use.key} {use.what} {shortened(redacted_text(use.value), 120)}" for use in found]
            raise _not_trusted(self.file, self.foreign, named)


def refuse_foreign_folder(folder: Path, trusts: bool, writes: str = "", code: bool = False) -> None:
    """ConfigError for the folder of a foreign run with links that lead out of it, in whose place a command would write,
    unless the user trusts it. `writes`: the only part of it that the command writes in; `code`: the command runs code of
    the models in it."""
    if trusts:
        return
    file = folder / SAVED_NAME
    try:
        foreign = unsigned_because(read_text(file, LARGEST_YAML), folder)
    except FileNotFoundError:  # with a recipe on the command line it is not needed
        foreign = f"it has no {SAVED_NAME}, whose signature would say who made it"
    except ValueError as error:
        raise _unreadable(file, error) from error
    if foreign is None:
        return
    found = [f"{link.relative_to(folder)} is a link to {os.readlink(link)}" for link in _links_out(folder, writes)]
    found += ["model.trust_remote_code runs the code in its models"] if code else []
    if found:
        raise _not_trusted(file, foreign, found)


def taken_up(config: Config | PreferenceConfig, locks: ExitStack) -> Checkpoint | None:
    """The checkpoint that `resume` names; None for a new run. Its run is locked before the newest checkpoint is looked for:
    one that still writes is refused, and so is a foreign folder with links out of it."""
    if not config.resume:
        return None
    from apportion.platform.run_lock import held
    from apportion.platform.runs import find_checkpoint, named_run

    folder = named_run(config.resume, config.runs_folder)
    refuse_foreign_folder(folder, config.trust_run)
    locks.enter_context(held(folder))
    return find_checkpoint(config.resume, config.runs_folder)


def _links_out(folder: Path, part: str) -> list[Path]:
    """Links in a run's folder that lead out of it. Checkpoints are only read and replaced as a whole."""
    entries = [folder / part] if part else []
    for top, folders, files in os.walk(folder / part):
        entries += [Path(top) / name for name in (*folders, *files)]
        if Path(top) == folder / "checkpoints":
            folders.clear()  # not to be walked
    whole = os.path.realpath(folder)
    return [e for e in entries if e.is_symlink() and not Path(os.path.realpath(e)).is_relative_to(whole)]


def _not_trusted(file: Path, foreign: str, found: list[str]) -> ConfigError:
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ConfigError(
        f"trust_run: got false with {file}: {'; '.join(found[:_SHOWN] + more)}; {foreign}; expected a run that you made in "
        "this place: look at these values, and if you trust them, add trust_run=true"
    )


def value_of(key: str, words: list[str]) -> str | None:
    """The last value that the command line gives a key whose value is a path."""
    values = [word.partition("=")[2] for word in words if word.partition("=")[0] == key]
    return os.path.expanduser(plain(values[-1])) if values else None


def chooses(words: list[str]) -> bool:
    return any(word.startswith(("experiment=", "algorithm=")) for word in words)


def resumed(words: list[str], stage: str | None = None) -> Path | None:
    """The saved configuration that `resume=` continues from, unless the command line names a recipe itself."""
    resume = value_of("resume", words)
    if resume in (None, "", "null") or chooses(words):
        return None
    runs = value_of("runs_folder", words) or "runs"
    saved = saved_config(str(resume), runs)
    if saved is None:
        raise no_such_run("resume", str(resume), runs)
    refuse_other_stage("resume", str(resume), saved, stage)
    return saved


def evaluated(checkpoint: str, words: list[str]) -> Path | None:
    """As `resumed`, for the checkpoint or run that `evaluate` measures; `words` are those after it."""
    runs = value_of("runs_folder", words) or "runs"
    saved = None if chooses(words) else saved_config(checkpoint, runs)
    there = Path(checkpoint).exists() or (Path(runs) / checkpoint).exists()
    if not there or (saved is None and not words):
        raise no_such_run("checkpoint", checkpoint, runs)
    if saved is not None:
        refuse_other_stage("checkpoint", checkpoint, saved, None)
    return saved


def refuse_redacted(config: Any) -> None:
    """ConfigError for values that a saved configuration has lost: secrets are not written to disk. The stages in
    `before` had theirs when they ran."""
    lost = [key for key, value, _ in leaves(config) if isinstance(value, str) and REDACTED in value]
    lost = [key for key in lost if key.split(".")[0] != "before"]
    if lost:
        raise ConfigError(
            f"{', '.join(lost)}: got {REDACTED}, which stands for a secret in a run's saved configuration, expected the "
            f"value itself: give it again on the command line ({lost[0]}=...)"
        )


def refuse_other_stage(what: str, got: str, saved: Path, stage: str | None) -> None:
    """ConfigError where the run was started by another command than the one that takes it up (None: train)."""
    from apportion.conf.preference_schema import STAGES

    keys = read_saved(saved)
    found = next((name for name in STAGES if name in keys), None)
    if found != stage:
        started, wanted = ((name or "train").replace("_", "-") for name in (found, stage))
        raise ConfigError(f"{what}: got {got!r}, a run of `apportion {started}`, expected one of `apportion {wanted}`")


def saved_config(path: str, runs_folder: str = "runs") -> Path | None:
    """The configuration kept by the run that `path` is, names, or lies in; None where there is none."""
    for start in (Path(path), Path(runs_folder) / path):
        if start.exists():
            # Also as it was named: `checkpoints` may be a link to a larger disk.
            for folder in (start, *start.resolve().parents[:3], *start.absolute().parents[:3]):
                if (folder / SAVED_NAME).is_file():
                    return folder / SAVED_NAME
    return None


def open_saved(file: Path) -> SavedRun:
    """ConfigError for a file that was spoilt by hand, and for one that gives orders to Hydra.

    A foreign one cannot trust itself, and does not say where this user's runs are.
    """
    try:
        text = read_text(file, LARGEST_YAML)
    except ValueError as error:
        raise _unreadable(file, error) from error
    values, foreign = _parsed(file, text), unsigned_because(text, file.parent)
    for key in _OF_HYDRA:
        if key in values:
            raise ConfigError(f"{file}: got the key {key}, which no run saves and Hydra would follow: remove it")
    values.pop("trust_run", None)
    if foreign is not None:
        values.pop("runs_folder", None)
    return SavedRun(file, values, foreign)


def read_saved(file: Path) -> dict[str, Any]:
    """What a run's saved configuration holds, for omegaconf: `${` in its texts is text, since every reference was
    resolved before it was saved. ConfigError for a file that was spoilt by hand."""
    try:
        return _parsed(file, read_text(file, LARGEST_YAML))
    except ValueError as error:
        raise _unreadable(file, error) from error


def _parsed(file: Path, text: str) -> dict[str, Any]:
    import yaml
    from omegaconf._utils import get_yaml_loader  # as OmegaConf.load reads, which has no place to escape between

    try:
        read = yaml.load(checked_yaml(text), Loader=get_yaml_loader())
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{file}: got a file that is no YAML ({yaml_problem(error)}), expected a run's configuration"
        ) from error
    except ValueError as error:
        raise _unreadable(file, error) from error
    if not isinstance(read, dict | None):
        raise ConfigError(f"{file}: got a {type(read).__name__}, expected a run's configuration, a mapping: correct it")
    _check_leaves(file, read or {})
    return _escaped(read or {})


def _unreadable(file: Path, error: ValueError) -> ConfigError:
    said = " ".join(str(error).split())
    return ConfigError(f"{file}: got a file that cannot be read ({said}), expected a run's configuration")


def _check_leaves(file: Path, value: Any, key: str = "") -> None:
    """ConfigError for a key that is no text or number, and for a number that no float can hold: omegaconf fails on both."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str | int) or (not key and not isinstance(name, str)):
                raise ConfigError(f"{file}: got the key {quoted(name)} in {key or 'it'}, expected text: correct it")
            _check_leaves(file, inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _check_leaves(file, inner, key)
    elif isinstance(value, int) and not isinstance(value, bool) and not is_number(value):
        raise ConfigError(f"{file}: {key}: got {quoted(value)}, expected a number that a float can hold: correct it")


def _escaped(value: Any) -> Any:
    """A copy that omegaconf resolves to what it was. A backslash before `${` has to be doubled, too.

    >>> _escaped({"prompt": "costs ${price}", "n": [1]})
    {'prompt': 'costs \\\\${price}', 'n': [1]}
    """
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def no_such_run(what: str, got: str, runs_folder: str) -> ConfigError:
    folder = Path(runs_folder)
    there = next((start for start in (Path(got), folder / got) if start.exists()), None)
    if there is not None:
        return ConfigError(
            f"{what}: got {there}, in which there is no {SAVED_NAME}, expected the folder of a run, which keeps its "
            f"configuration there: copy the {SAVED_NAME} of the run that wrote it, or name another run"
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    return ConfigError(
        f"{what}: got {got!r}, expected a run's folder, its name under {runs_folder}/, or one of its checkpoints"
        f"{nearest(Path(got).name, names)}"
    )
