"""Checks of single values, each said in one line: got / expected."""

from __future__ import annotations

from typing import Any

from apportion.platform.errors import ConfigError, nearest

MISSING: Any = "???"  # a value that has to be given, as omegaconf spells it


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid and value != MISSING:
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(valid)}{nearest(value, valid)}")


def at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name}: got {value}, expected at least {low}")


def between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}: got {value}, expected {low} to {high}")
