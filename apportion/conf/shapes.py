"""Checks of a composed configuration's shape, which omegaconf leaves out where a value comes by reference or in a list."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from apportion.conf.checks import MISSING
from apportion.conf.explain import words_of
from apportion.platform.errors import ConfigError
from apportion.platform.messages import quoted, shortened

# Keys whose value is a path, or a name that may be one.
PATHS = (
    "runs_folder", "resume", "model.path", "model.chat_template", "critic.model", "reference.model", "teachers.dpo",
    "teachers.other", "data.train", "data.eval", "judge.model", "judge.cache", "dpo.reference",
)  # fmt: skip
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes that Linux takes


def check_shape(resolved: Any, kind: type) -> None:
    """ConfigError for a value of another type than the schema's `kind` gives its key, and for a path that no file can
    have."""
    _check(resolved, kind, "")


def _check(value: Any, hint: Any, key: str) -> None:
    if value == MISSING:
        return
    section = next((part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None)
    if section is not None and isinstance(value, Mapping):
        hints = {field.name: get_type_hints(section)[field.name] for field in fields(section)}
        if unknown := [str(name) for name in value if name not in hints]:  # by reference, another section's
            raise ConfigError(f"{key}: got the keys {shortened(', '.join(unknown), 300)}, expected {words_of(section)}")
        if missing := [f"{key}.{name}" if key else name for name in hints if name not in value]:
            raise ConfigError(
                f"{missing[0]}: got a deletion, expected {missing[0]}=VALUE: a key of the schema cannot be deleted"
            )
        for name, inner in value.items():
            _check(inner, hints[name], f"{key}.{name}" if key else str(name))
        return
    if not _fits(value, hint):
        raise ConfigError(f"{key}: got {quoted(value)}, expected {words_of(hint)}")
    if key in PATHS:
        for text in [value] if isinstance(value, str) else _texts(value):
            check_path(key, text)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is list or hint is list:
        return isinstance(value, list) and all(_fits(item, part) for item in value for part in parts[:1])
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    if hint is Any:
        return True
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (isinstance(hint, type) and is_dataclass(hint))


def _texts(value: Any) -> list[str]:
    """The paths of a list of sources, each a text or a mapping with `source`."""
    items = value if isinstance(value, list) else [value]
    found = [item.get("source") if isinstance(item, Mapping) else item for item in items]
    return [text for text in found if isinstance(text, str)]


def check_path(key: str, text: str) -> None:
    """ConfigError for a path that no file can have."""
    size = max(len(name.encode("utf-8", "replace")) for name in text.split("/"))
    if size > _LONGEST_NAME or len(text.encode("utf-8", "replace")) > _LONGEST_PATH:
        raise ConfigError(
            f"{key}: got {quoted(text)}, expected a path of at most {_LONGEST_PATH} bytes, and names in it of at most "
            f"{_LONGEST_NAME}"
        )
    if text and not text.strip():
        raise ConfigError(f"{key}: got {quoted(text)}, expected a path, not white space alone")
    if "\0" in text:
        raise ConfigError(f"{key}: got {quoted(text)}, expected a path, which has no zero character")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ConfigError(f"{key}: got {quoted(text)}, expected ~/ or ~USER of a user that this machine has")
