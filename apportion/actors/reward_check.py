"""What can be found wrong with the rewards before anything starts: names, imports, parameters, columns.

A user's module is imported here once more than in the reward actors; a service and a reward model are left to them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from apportion.actors.reward_sources import (
    RESERVED,
    FunctionSource,
    RewardEntry,
    columns_problem,
    function_source,
    parse_entries,
)
from apportion.platform.errors import ConfigError
from apportion.platform.metric_names import METRICS

# A component's mean is logged as `reward/NAME`: these are other metrics, and `square` is what the std is made of.
TAKEN_NAMES = (
    *(name.removeprefix("reward/") for name in METRICS if name.startswith("reward/") and "<" not in name),
    "square",
)


def check_functions(functions: Any, timeout_seconds: float) -> list[FunctionSource]:
    """The functions among `reward.functions`; ConfigError for one that does not exist or cannot be imported, and for a
    component of any kind whose name cannot be a metric's."""
    entries = parse_entries(functions, timeout_seconds)
    if functions is not None and not entries:
        raise ConfigError("reward.functions: got an empty list, expected at least one")
    functions_found = []
    for entry in entries:
        if entry.is_service:
            host = _host(entry)  # all of its addresses are checked
            _check_name(entry.name or host)
        elif _is_function(entry):
            source = function_source(entry)
            functions_found.append(source)
            _check_name(source.name)
        else:  # a reward model, whose name without one is fixed and free
            _check_name(entry.name or "")
    return functions_found


def _is_function(entry: RewardEntry) -> bool:
    if isinstance(entry.function, str):
        return not entry.is_service and not entry.function.startswith("model:")
    return entry.function is not None


def check_outages(functions: Any, timeout_seconds: float, outage_seconds: float, call_timeout_seconds: float) -> None:
    """ConfigError where a call's limit would end the wait for a service that is away."""
    for entry in parse_entries(functions, timeout_seconds):
        waited = outage_seconds if entry.outage_seconds is None else entry.outage_seconds
        if entry.is_service and waited and waited + 2 * entry.timeout_seconds >= call_timeout_seconds:
            raise ConfigError(
                f"reward.outage_seconds: got {waited:g} for the service at {_host(entry)}, with timeout_seconds="
                f"{entry.timeout_seconds:g} before and after it, expected together less than "
                f"cluster.call_timeout_seconds={call_timeout_seconds:g}, which stops the run; lower one or raise the other"
            )


def _host(entry: RewardEntry) -> str:
    """What a service is called that has no name."""
    return urlsplit(entry.addresses[0]).hostname or ""


def _check_name(name: str) -> None:
    problem = "that is the name of another metric" if name in TAKEN_NAMES else "it has a /" if "/" in name else None
    if problem:
        raise ConfigError(
            f"reward.functions: got a component named {name!r} ({problem}), expected one that can be logged as "
            "reward/NAME; give it another `name:`"
        )


def has_models(functions: Any) -> bool:
    """Whether a reward model is among `reward.functions`."""
    entries = [entry.function for entry in parse_entries(functions, 1.0)]
    return any(isinstance(function, str) and function.startswith("model:") for function in entries)


def check_columns(
    functions: Sequence[FunctionSource], columns: Collection[str], where: str, paths: Sequence[str] = ()
) -> None:
    """ConfigError where a function needs a column that `where` (data.train, data.eval) does not have.

    `columns` are the source's but the prompt's; `paths` are the ones inside them.
    """
    if taken := sorted(set(columns) & set(RESERVED)):
        raise ConfigError(
            f"{where}: got a column named {taken[0]!r}, reward functions get something else of that name; rename it"
        )
    for function in functions:
        if problem := columns_problem(function, sorted(columns), paths, where):
            raise ConfigError(problem)
