"""Run folders: made once, never shared; the configuration without its secrets; the summary; what `resume=` means.

runs/NAME/  config.yaml  metrics.jsonl  samples.jsonl  summary.json  plots/  tensorboard/  checkpoints/
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
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
from apportion.platform.messages import warn
from apportion.platform.run_lock import held, is_held
from apportion.platform.signature import signed

REDACTED = "<redacted>"
COMMAND_LINES = "before"  # the key under which a configuration holds words of commands
_METRICS_FILES = ("metrics.jsonl", "samples.jsonl")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@-]*")
_LONGEST_NAME = 255  # bytes that a file system takes
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")  # a number for the reader of a saved configuration, not for safe_dump
_SECRET_WORDS = r"token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?|authorization|auth"
_SECRET_KEY = re.compile(rf"(?:^|_)(?:{_SECRET_WORDS})$")
# Text tokens of a tokenizer, not credentials.
_TEXT_TOKEN_KEY = re.compile(
    r"(?:^|_)(?:bos|eos|pad|unk|sep|cls|mask|stop|start|end|begin|image|special|prefix|step)_token$"
)
# From where a name begins: tried from each of its letters, a long one would take the square of its length.
_SECRET_NAME = rf"(?<![A-Za-z0-9_.-])(?P<before>[A-Za-z0-9_.-]*?)(?P<word>{_SECRET_WORDS})"
_QUOTED = r"""(?P<open>\\?['"])(?P<quoted>.*?)(?P=open)"""
_ASSIGNMENT = re.compile(rf"(?P<head>{_SECRET_NAME}=)(?:{_QUOTED}|(?P<bare>[^\s&'\",;}}\]]+))", re.IGNORECASE)
_ENTRY = re.compile(  # `key: value` as YAML and JSON write it; `lead` is what stands before the key of a mapping
    rf"""(?P<head>(?P<lead>[{{,]\s*\\?['"]?|\\?['"])?{_SECRET_NAME}(?:\\?['"]\s*:\s*|\s*:\s+))"""
    rf"(?:{_QUOTED}|(?P<bare>[^\s&'\",;}}\]{{\[][^\s&'\",;}}\]]*))",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"((?:(?:proxy-)?authorization|(?:x-)?api-?key|x-[a-z-]*token)\s*:\s*)(\S+(?: \S+)?)", re.IGNORECASE
)
_KNOWN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{16}|(?:Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_URL_USER = re.compile(r"(://)[^/\s]+@")  # up to the last @: a password may hold one
_URL = re.compile(r"://[^\s]+")
_QUERY_SECRET = re.compile(  # besides the names of an assignment: words that are secrets in an address alone
    r"([?&#;](?:(?:[\w.-]*[._-])?(?:key|sig|signature|pwd|pass)|code)=)(?:[^\s&#'\"\\,;}\]]|[,;](?=[^\s'\"\\]))+",
    re.IGNORECASE,
)


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
        """`summary.json`, whole or not at all; values that are not finite are null."""
        file = self.path / "summary.json"
        write_text_atomically(
            file, json.dumps(_json_values(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
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


def redacted(config: Any) -> Any:
    """A copy without secrets: values under telling keys, `KEY=value` texts, users and keys in addresses, known token shapes.

    >>> redacted({"api_key": "abc", "max_prompt_tokens": 8, "eos_token": "</s>"})
    {'api_key': '<redacted>', 'max_prompt_tokens': 8, 'eos_token': '</s>'}
    """
    if isinstance(config, Mapping):
        return {key: _redacted_under(str(key), value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [redacted(value) for value in config]
    # `"token": "word"` in a prompt or pattern is no secret; in words of a command it may be.
    return redacted_text(config, entries=False) if isinstance(config, str) else config


def redacted_text(text: str, entries: bool = True) -> str:
    """A text (an override, a log line, an address) without secrets; `entries`: those written as `key: value` too.

    >>> redacted_text("http://me:p@w@host/v1?api_key=abc&n=1&sig=x%3D")
    'http://<redacted>@host/v1?api_key=<redacted>&n=1&sig=<redacted>'
    """
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    if "://" in text:
        text = _URL_USER.sub(rf"\1{REDACTED}@", text)
        text = _URL.sub(lambda url: _QUERY_SECRET.sub(rf"\1{REDACTED}", url[0]), text)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    text = _ASSIGNMENT.sub(_redacted_value, _KNOWN_SHAPES.sub(REDACTED, text))
    return _ENTRY.sub(_redacted_entry, text) if entries else text


def _environment_secrets() -> list[str]:
    """Values of environment variables with a telling name, longest first; short ones are words, not secrets."""
    found = {
        value for name, value in os.environ.items() if _is_secret_key(name) and len(value) >= 12 and "/" not in value
    }
    return sorted(found, key=len, reverse=True)


def _name(match: re.Match[str]) -> str:
    """Of `MYTOKEN` the word alone: what stands before it without a separator says nothing."""
    before = match["before"]
    return before + match["word"] if before[-1:] in ("_", ".", "-") else match["word"]


def _redacted_value(match: re.Match[str]) -> str:
    key, value = _name(match), match["bare"] or match["quoted"] or ""
    harmless = value.lower() in ("", "null", "none", "true", "false")
    # As under a mapping's key: `kl_per_token=0.1` is no secret.
    number = "token" in key.lower() and re.fullmatch(r"[-+]?[0-9.]+(?:e[-+]?[0-9]+)?", value, re.IGNORECASE)
    if harmless or number or not _is_secret_key(key):
        return match[0]
    quote = match["open"] or ""
    return f"{match['head']}{quote}{REDACTED}{quote}"


def _redacted_entry(match: re.Match[str]) -> str:
    """In prose ("The password: say friend") a plain word before a colon is no key; `api_key` is one anywhere."""
    return _redacted_value(match) if match["lead"] or "_" in _normal_key(_name(match)) else match[0]


def _redacted_under(key: str, value: Any) -> Any:
    if key == COMMAND_LINES and isinstance(value, list):
        return [redacted_text(str(line)) for line in value]
    # A number is no secret under a key like `kl_per_token`, but may well be a password.
    harmless = value is None or isinstance(value, bool) or (isinstance(value, int | float) and "token" in key.lower())
    return redacted(value) if harmless or not _is_secret_key(key) else REDACTED


def _is_secret_key(key: str) -> bool:
    normal = _normal_key(key)
    return bool(_SECRET_KEY.search(normal)) and not _TEXT_TOKEN_KEY.search(normal)


def _normal_key(key: str) -> str:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_")


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
