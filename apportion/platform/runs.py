"""Run folders: made once, never shared; the configuration without its secrets; the summary; what `resume=` means.

runs/NAME/  config.yaml  metrics.jsonl  samples.jsonl  summary.json  plots/  tensorboard/  checkpoints/
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.platform.checkpoint import FOLDER_PATTERN, Checkpoint, CheckpointStore
from apportion.platform.errors import ConfigError, nearest
from apportion.platform.files import write_text_atomically
from apportion.platform.foreign import LARGEST_YAML, checked_yaml, read_text
from apportion.platform.known_secrets import redacted, without_known
from apportion.platform.messages import warn
from apportion.platform.run_lock import held, is_held
from apportion.platform.signature import signed

_METRICS_FILES = ("metrics.jsonl", "samples.jsonl")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@-]*")
_LONGEST_NAME = 255  # bytes that a file system takes
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")  # a number for the reader of a saved configuration, not for safe_dump


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def save_config(self, config: Mapping[str, Any]) -> None:
        """`config.yaml`, without secrets, signed as this user's own. Trust in what the run was is not kept: this user has
        seen it, and signs what came of it."""
        text = _yaml(redacted(config) | ({"trust_run": False} if "trust_run" in config else {}))
        try:
            text = signed(text, self.path)
        except OSError as error:
            _warn_once(
                f"{self.path} is not signed as your own ({error}), so that resume and evaluate may ask for trust_run=true"
            )
        write_text_atomically(self.path / "config.yaml", text)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """`summary.json`, whole or not at all, without secrets; values that are not finite are null."""
        file = self.path / "summary.json"
        values = without_known(_json_values(summary))
        write_text_atomically(file, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return file


def _yaml(config: Mapping[str, Any]) -> str:
    """Text that omegaconf reads as what it was: a name such as 1e5 in quotes, too."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    return yaml.dump(config, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def make_run_folder(root: str | Path, name: str | None, recipe: str) -> RunFolder:
    """A folder of its own for one run. Without a name it is made from recipe, time and a random tail.

    Two runs never get the same one: the folder is made exclusively, and a name that is taken is a ConfigError, unless by
    a start that failed.
    """
    folder = Path(root)
    check_run_name(name)
    if name is not None:
        candidates = [name]
    else:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", recipe).strip("-")[:100] or "run"
        candidates = [f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}" for _ in range(20)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"runs_folder: got {folder}, which cannot be made ({error.strerror}); expected a writable folder"
        ) from error
    for candidate in candidates:
        try:
            (folder / candidate).mkdir()
        except FileExistsError:
            if name is None or not _taken_over(folder / candidate):
                continue
        except OSError as error:
            raise ConfigError(
                f"runs_folder: got {folder}, not writable ({error.strerror}); expected a writable folder"
            ) from error
        return RunFolder(folder / candidate)
    raise ConfigError(
        f"run_name: got {candidates[0]!r}, which {folder} already has; expected a new name, or resume={candidates[0]}"
    )


def check_run_name(name: str | None) -> None:
    """ConfigError for a name that a folder cannot have, or that a shell would read as something else."""
    if name is not None and len(name.encode(errors="replace")) > _LONGEST_NAME:
        raise ConfigError(
            f"run_name: got {name[:20]}... of {len(name.encode(errors='replace'))} bytes, expected at most {_LONGEST_NAME}, the most "
            "that a folder's name can have"
        )
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(
            f"run_name: got {name!r}, expected letters, digits and . _ - + = @ (a folder's name, no path)"
        )


def never_began(folder: Path) -> bool:
    """Whether a start ended here after its configuration was saved and before its first metrics or checkpoint. Of a run
    without `tracking.jsonl` that is not known."""
    import yaml

    try:
        text = checked_yaml(read_text(folder / "config.yaml", LARGEST_YAML))
        keeps_metrics = yaml.safe_load(text)["tracking"]["jsonl"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
    metrics = [folder / name for name in _METRICS_FILES]
    return keeps_metrics is True and not (
        any(map(_has_text, metrics)) or (folder / "summary.json").exists() or _has_checkpoints(folder)
    )


def _has_text(file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another start may be taking the folder over
        return file.stat().st_size > 0
    return False


def _taken_over(folder: Path) -> bool:
    """Make the folder of a start that failed this run's own. Without its configuration it is nobody else's to take."""
    if not never_began(folder):
        return False
    try:
        with held(folder):
            # Not held though it is: a file system without locks, on which another start may be under way here.
            if not is_held(folder) or not never_began(folder):
                return False
            for name in (*_METRICS_FILES, "config.yaml"):
                (folder / name).unlink(missing_ok=True)
    except ConfigError:  # a run that is starting
        return False
    return True


def find_checkpoint(argument: str, runs_root: str | Path) -> Checkpoint:
    """What `resume=` names: a checkpoint's folder, a run's folder, or a run's name below `runs_root`.

    The checkpoint is whole, checked byte by byte; of a run it is the newest whole one. ConfigError says what was found.
    The run's folder is two levels above the checkpoint's (`run_of`), and is known to be one: who resumes writes there.
    """
    run, checkpoint = _named(argument, runs_root)
    return CheckpointStore(run / "checkpoints").open(checkpoint) if checkpoint else _newest_of_run(run)


def resumed_folder(argument: str, runs_root: str | Path) -> Path | None:
    """The checkpoint that `find_checkpoint` finds if every byte is as written, which is not looked at here; None where
    the run has none."""
    run, named = _named(argument, runs_root)
    if named:
        return named
    store = CheckpointStore(run / "checkpoints")
    newest = store.newest_by_size()
    if newest is not None:
        tell_skipped(store, newest)
    return newest


def tell_skipped(store: CheckpointStore, chosen: Path) -> None:
    """Warn of each later checkpoint that the last search of `store` found damaged."""
    for problem in store.skipped:
        _warn_once(f"{store.root}/{problem}; taking {chosen.name} instead, the newest that is whole")


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)


def named_run(argument: str, runs_root: str | Path) -> Path:
    """The run's folder of what `find_checkpoint` finds, without reading a checkpoint: to be held first, since whoever
    holds it may be writing another."""
    return _named(argument, runs_root)[0]


def _named(argument: str, runs_root: str | Path) -> tuple[Path, Path | None]:
    """A run's folder, and the checkpoint in it if that is what was named."""
    given = Path(argument)
    # Also as it was named: `checkpoints`, or a checkpoint, may be a link to a larger disk.
    named = [folder for folder in (given.resolve(), given.absolute()) if FOLDER_PATTERN.fullmatch(folder.name)]
    if given.is_dir() and named:
        for folder in named:
            if folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").is_file():
                return folder.parent.parent, folder
        raise ConfigError(
            f"checkpoint: got {argument!r}, which lies in no run's folder, expected RUN/checkpoints/{named[0].name} "
            "beside RUN/config.yaml: lay a copy out so, with the config.yaml of the run that wrote it"
        )
    for folder in (given, Path(runs_root) / argument):
        if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():
            if not (folder / "config.yaml").is_file():
                raise ConfigError(
                    f"resume: got {folder}, a folder with checkpoints and no config.yaml, expected a run's: lay it out as "
                    "RUN/config.yaml and RUN/checkpoints, with the config.yaml of the run that wrote them"
                )
            return folder.resolve(), None
    found = _runs_with_checkpoints(Path(runs_root))
    close = nearest(argument, found)
    listed = f"{runs_root} has {', '.join(found[:5])}" if found else f"no run in {runs_root} has a checkpoint"
    there = next((folder for folder in (given, Path(runs_root) / argument) if folder.exists()), None)
    if there is not None:
        raise ConfigError(
            f"resume: got {there}, which has neither a config.yaml nor a folder checkpoints, expected a run's folder or "
            f"name, or a checkpoint; {listed}"
        )
    raise ConfigError(f"resume: got {argument!r}, expected a run's folder or name, or a checkpoint{close}; {listed}")


def run_of(checkpoint: Checkpoint) -> RunFolder:
    """The run that wrote `checkpoint`."""
    return RunFolder(checkpoint.path.parent.parent)


def _newest_of_run(folder: Path) -> Checkpoint:
    store = CheckpointStore(folder / "checkpoints")
    newest = store.latest()
    if newest is None:
        found = "; ".join(store.problems()) or "no checkpoint"
        raise ConfigError(f"resume: got run {folder}, expected one with a whole checkpoint; found: {found}")
    tell_skipped(store, newest.path)
    return newest


def _runs_with_checkpoints(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    runs = [run for run in root.iterdir() if _has_checkpoints(run)]
    return [run.name for run in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)]


def _has_checkpoints(run: Path) -> bool:
    return (run / "checkpoints").is_dir() and bool(CheckpointStore(run / "checkpoints").steps())


def _json_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _json_values(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
