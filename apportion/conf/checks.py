"""Checks of single values, each said in one line: got / expected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from apportion.platform.addresses import address_problem
from apportion.platform.errors import ConfigError, nearest
from apportion.platform.messages import quoted

MISSING: Any = "???"  # a value that has to be given, as omegaconf spells it
LARGEST_SEED = 2**32 - 1  # that numpy takes
SMALLEST_STORE_GIB = 0.075  # Ray starts with none smaller (75 MiB)
# Bounds that nobody needs to pass. Beyond them a value is a slip, and what would be made of it is an overflow, a number that
# float32 rounds to 0 or infinity, or a wait without end.
LARGEST_COUNT = 2**31 - 1
MOST_ACTORS = 10_000  # of one role
MOST_THREADS = 10_000  # of one actor
LARGEST_GIB = 1_000_000
MOST_RETRIES = 1000
LONGEST_SECONDS, SHORTEST_SECONDS = 100_000_000, 1e-3
LONGEST_MINUTES, SHORTEST_MINUTES = 1e7, 1e-6
LARGEST, SMALLEST = 1e30, 1e-30  # of coefficients and thresholds, which float32 holds
COLDEST, HOTTEST = 0.01, 100.0  # temperatures; vLLM samples at 0.01 where it is asked for less


# Sections whose mappings are components of the registry; a function's own parameters may be any numbers.
OWN_COMPONENTS = ("algorithm.", "sft.")


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid and value != MISSING:
        raise ConfigError(f"{name}: got {quoted(value)}, expected one of {', '.join(valid)}{nearest(value, valid)}")


def at_least(name: str, value: float | None, low: float, high: float = LARGEST_COUNT) -> None:
    """An infinity and NaN are left to `check_finite`."""
    if value is not None and value < low:
        raise ConfigError(f"{name}: got {value}, expected at least {low}")
    if value is not None and value > high and value != math.inf:
        raise ConfigError(f"{name}: got {value}, expected at most {high}")


def above_zero(name: str, value: float | None, least: float, most: float, why: str = "") -> None:
    """`why` follows what is expected of a value that is not above 0."""
    if value is None:
        return
    if value <= 0:
        raise ConfigError(f"{name}: got {value}, expected above 0{why}")
    if not least <= value <= most and _is_finite(value):
        raise ConfigError(f"{name}: got {value}, expected {least:g} to {most:g}")


def from_zero(name: str, value: float | None, least: float, most: float) -> None:
    """0, or a number from `least` on: one below it would act as 0 without saying so."""
    if value is None or value == 0:
        return
    if value < 0:
        raise ConfigError(f"{name}: got {value}, expected at least 0")
    if not least <= value <= most and _is_finite(value):
        raise ConfigError(f"{name}: got {value}, expected 0, or {least:g} to {most:g}")


def check_cluster_address(address: str | None) -> None:
    """ConfigError for what cannot be the address of a Ray cluster. One of another kind (a plugin of Ray) is left to Ray."""
    kind, mark, rest = (address or "").rpartition("://")
    if address in (None, "auto", "local") or (mark and kind != "ray"):
        return
    if problem := address_problem(f"http://{rest}"):
        raise ConfigError(
            f"cluster.address: got an address {problem}, expected HOST:PORT, ray://HOST:PORT or auto, or null for a Ray of "
            "the run's own"
        )


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def between(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name}: got {value}, expected {low} to {high}")


def check_warmup(section: str, warmup: int, steps: int) -> None:
    """ConfigError where the optimizer steps of a run end before its warm-up does; a run of none measures alone."""
    if warmup > steps > 0:
        raise ConfigError(
            f"{section}.warmup_steps: got {warmup} for the run's {steps} optimizer steps, expected at most {steps}, or the "
            f"rate would never be {section}.learning_rate"
        )


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
        if free and key.startswith(OWN_COMPONENTS) and _is_number(value):
            size = abs(value)
            if size and _is_finite(value) and not SMALLEST <= size <= LARGEST:
                raise ConfigError(f"{key}: got {value}, expected 0, or {SMALLEST:g} to {LARGEST:g} in size")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
