"""Everything of a run that is not a tensor, as a checkpoint's `state.json` keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from apportion.platform.errors import CheckpointError
from apportion.platform.foreign import read_json
from apportion.platform.messages import quoted

STATE_FILE = "state.json"
FORMAT = 1
_OTHER = "take another checkpoint"


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold, and no bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= 1.7e308 if isinstance(value, int) else math.isfinite(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _mapping_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_COUNT = (is_count, "a whole number from 0")
_MAPPING = (lambda value: isinstance(value, dict), "a mapping")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {  # whether a value fits, and what is expected
    "step": _COUNT,
    "policy_version": _COUNT,
    "data": _MAPPING,
    "seeds": (_mapping_of(is_count), "a mapping of whole numbers"),
    "trackers": (_mapping_of(lambda value: isinstance(value, dict)), "a mapping of mappings"),
    "kl": (lambda value: value is None or _mapping_of(is_number)(value), "null or a mapping of numbers"),
    "extra": _MAPPING,
    "ranks": (_mapping_of(lambda value: isinstance(value, dict)), "a mapping of mappings"),
}


def check_values(values: Mapping[str, Any], kind: type, where: str) -> None:
    """CheckpointError for a value that does not fit its type in the dataclass `kind`. Null may be a number that was not
    finite. Unknown names are not looked at."""
    for name, hint in get_type_hints(kind).items():
        if name in values and not _fits(values[name], hint):
            raise CheckpointError(f"{where}.{name}: got {quoted(values[name])}, expected {_words(hint)}: {_OTHER}")


def _fits(value: Any, hint: Any) -> bool:
    parts = get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    plain = {int: is_count, float: lambda v: v is None or is_number(v), type(None): lambda v: v is None}
    return plain[hint](value) if hint in plain else hint is Any or isinstance(value, hint)


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


@dataclass
class RunState:
    """Everything of a run that is not a tensor. JSON values only.

    `data` is the data's own position, `trackers` the run ids of `Tracker.state`, `kl` the adaptive coefficient's state,
    `seeds` every seed by what it is for, `extra` what a later version of the loop adds, `ranks` how each trained role is
    spread over ranks (empty in what earlier versions wrote).
    """

    step: int
    policy_version: int
    data: dict[str, Any]
    seeds: dict[str, int] = field(default_factory=dict)
    trackers: dict[str, Any] = field(default_factory=dict)
    kl: dict[str, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `state.json`. A number that is not finite is unknown, and null; TypeError for what is no JSON value."""
        text = json.dumps({"format": FORMAT, **_known(asdict(self))}, indent=2, allow_nan=False)
        (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> RunState:
        """Read `state.json`; CheckpointError if it is missing, broken or of another format."""
        file = folder / STATE_FILE
        try:
            read = read_json(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); expected the state of a run: {_OTHER}") from error
        if not isinstance(read, dict):
            raise CheckpointError(
                f"{file}: got a {type(read).__name__}, expected the state of a run, a mapping: {_OTHER}"
            )
        version = read.pop("format", None)
        expected = {f.name for f in fields(RunState)}
        read.setdefault("ranks", {})
        if version != FORMAT or set(read) != expected:
            odd = ", ".join(sorted(set(read) ^ expected)) or "none"
            raise CheckpointError(
                f"{file}: got format {version} (fields that differ: {odd}), expected format {FORMAT}: "
                "resume with the version that wrote it"
            )
        wrong = next((name for name, (fits, _) in _VALUES.items() if not fits(read[name])), None)
        if wrong is not None:
            raise CheckpointError(f"{file}: {wrong}: got {quoted(read[wrong])}, expected {_VALUES[wrong][1]}: {_OTHER}")
        return RunState(**read)


def _known(value: Any) -> Any:
    """A copy in which floats that are not finite are None."""
    if isinstance(value, dict):
        return {key: _known(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
