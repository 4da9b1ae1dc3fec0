"""Checks of single values, each said in one line: got / expected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from apportion.platform.errors import ConfigError, nearest
from apportion.platform.messages import quoted

MISSING: Any = "???"  # a value that has to be given, as omegaconf spells it
LARGEST_SEED = 2**32 - 1  # that numpy takes
SMALLEST_STORE_GIB = 0.075  # Ray starts with none smaller (75 MiB)


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid and value != MISSING:
        raise ConfigError(f"{name}: got {quoted(value)}, expected one of {', '.join(valid)}{nearest(value, valid)}")


def at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name}: got {value}, expected at least {low}")


def above(name: str, value: float | None, low: float) -> None:
    if value is not None and not value > low:
        raise ConfigError(f"{name}: got {value}, expected above {low}")


def between(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name}: got {value}, expected {low} to {high}")


def leaves(value: Any, key: str = "", free: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """(dotted key, value, whether it stands in a mapping of a component's own keys) of everything in a configuration."""
    parts: list[tuple[Any, Any]]
    if is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, Mapping):
        parts, free = list(value.items()), True
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    else:
        yield key, value, free
        return
    for name, part in parts:
        yield from leaves(part, f"{key}.{name}" if key else str(name), free)


def check_finite(config: Any) -> None:
    """ConfigError for a number that is none. NaN passes every comparison with a bound, and an infinity the upper ones;
    a component may give an infinity a meaning (a threshold that nothing reaches)."""
    for key, value, free in leaves(config):
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not free)):
            raise ConfigError(f"{key}: got {value}, expected a finite number")
