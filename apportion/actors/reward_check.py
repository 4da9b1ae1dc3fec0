"""What can be found wrong with the rewards before anything starts: names, imports, parameters, columns.

A user's module is imported here once more than in the reward actors; a service and a reward model are left to them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from apportion.actors.reward_sources import RESERVED, FunctionSource, function_source, parse_entries
from apportion.platform.errors import ConfigError


def check_functions(functions: Any, timeout_seconds: float) -> list[FunctionSource]:
    """The functions among `reward.functions`; ConfigError for one that does not exist or cannot be imported."""
    entries = parse_entries(functions, timeout_seconds)
    if functions is not None and not entries:
        raise ConfigError("reward.functions: got an empty list, expected at least one")
    return [
        function_source(entry)
        for entry in entries
        if callable(entry.function)
        or (entry.function is not None and not entry.function.startswith(("http://", "https://", "model:")))
    ]


def has_models(functions: Any) -> bool:
    """Whether a reward model is among `reward.functions`."""
    entries = [entry.function for entry in parse_entries(functions, 1.0)]
    return any(isinstance(function, str) and function.startswith("model:") for function in entries)


def check_columns(functions: list[FunctionSource], columns: Collection[str], where: str) -> None:
    """ConfigError where a function needs a column that `where` (data.train, data.eval) does not have.

    `columns` are the source's but the prompt's.
    """
    if taken := sorted(set(columns) & set(RESERVED)):
        raise ConfigError(
            f"{where}: got a column named {taken[0]!r}, reward functions get something else of that name; rename it"
        )
    for function in functions:
        if missing := function.missing_columns(set(columns)):
            raise ConfigError(
                f"reward.functions {function.name}: needs {', '.join(map(repr, missing))}, {where} has columns "
                f"{', '.join(sorted(columns)) or 'none'}; rename one, or use params"
            )
