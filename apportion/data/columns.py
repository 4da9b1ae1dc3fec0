"""Values of a row by name or by path: `answer`, or `reward_model.ground_truth` for a key inside a column."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

_IMMUTABLE = (str, int, float, bool, bytes, type(None))
# Where data sets keep the reference answer when they do not call it `answer`.
ANSWER_NAMES = ("ground_truth", "answer", "label", "solution", "target", "reference")


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at `path`, None where the row has none. A column whose own name has dots goes first.

    >>> value_at({"reward_model": {"style": "rule", "ground_truth": "2"}}, "reward_model.ground_truth")
    '2'
    """
    if path in row:
        return row[path]
    name, _, rest = path.partition(".")
    inside = row.get(name)
    return value_at(inside, rest) if rest and isinstance(inside, Mapping) else None


def nested_paths(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every path to a value inside a column, in the order of the columns.

    >>> nested_paths([{"prompt": "1+1?", "reward_model": {"style": "rule", "ground_truth": "2"}}])
    ['reward_model.style', 'reward_model.ground_truth']
    """
    found: dict[str, None] = {}

    def walk(values: Mapping[str, Any], before: str) -> None:
        for name, value in values.items():
            if before:
                found[f"{before}{name}"] = None
            if isinstance(value, Mapping):
                walk(value, f"{before}{name}.")

    for row in rows:
        walk(row, "")
    return list(found)


def answer_path(names: Sequence[str], paths: Sequence[str]) -> str | None:
    """The column or path that looks like a reference answer, None where none does.

    >>> answer_path(["data_source", "reward_model"], ["reward_model.style", "reward_model.ground_truth"])
    'reward_model.ground_truth'
    """
    for wanted in ANSWER_NAMES:
        for path in (*names, *paths):
            if path.rpartition(".")[2] == wanted:
                return path
    return None


def own_copy(value: Any) -> Any:
    """A copy that shares nothing that can be changed, so that whoever gets it may change it.

    >>> messages = [{"role": "user", "content": "1+1?"}]
    >>> own_copy(messages) == messages, own_copy(messages)[0] is messages[0]
    (True, False)
    """
    if isinstance(value, _IMMUTABLE):
        return value
    if type(value) is list:
        return value.copy() if all(isinstance(v, _IMMUTABLE) for v in value) else [own_copy(v) for v in value]
    if type(value) is dict:
        return {key: own_copy(v) for key, v in value.items()}
    return copy.deepcopy(value)
