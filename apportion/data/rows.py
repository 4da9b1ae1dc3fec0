"""A row, what the configuration says of a source of rows, and which rows can become prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apportion.data.errors import DataError, listed
from apportion.data.messages import clean_messages

EXPECTED = (
    "a .jsonl, .json, .csv or .parquet file, a saved dataset's folder, hf:NAME, gym:TASK, function:NAME or arithmetic"
)

LARGEST_ROW = 2**25  # characters: more than any model reads; a small .gz may hold a line of gigabytes


# (a row's columns, the prompt's column) -> why the row cannot be used, as (reason, message), or None where it can
RowCheck = Callable[[Mapping[str, Any], str], tuple[str, str] | None]


@dataclass
class Row:
    """One row of a source, as it was written."""

    number: int  # 0-based place in its source, bad rows counted
    place: str  # for messages: "train.jsonl:12"
    values: dict[str, Any]


LARGEST = 2**32 - 1  # of the whole numbers that a source takes; seeds go so far


@dataclass
class SourceSpec:
    """What the configuration says of one source."""

    source: str
    weight: float = 1.0  # share of the prompts drawn, relative to the other sources'
    limit: int | None = None  # the first rows only
    name: str | None = None  # in prompt ids and metrics; null: made from `source`
    split: str | None = None
    prompt_column: str | None = None  # null: the run's, or "prompt" where rows are made here
    parameters: dict[str, Any] = field(default_factory=dict)  # the source's own

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise DataError(f"source: got {self.source!r}, expected {EXPECTED}")
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not is_number or not 1e-30 <= self.weight <= 1e30:
            raise DataError(f"{self.source}: got weight {self.weight!r}, expected a number above 0, 1e-30 to 1e+30")
        if self.limit is not None:
            check_whole(self.source, "limit", self.limit, least=1)
        for key in ("name", "split", "prompt_column"):
            if (value := getattr(self, key)) is not None and not isinstance(value, str):
                raise DataError(f"{self.source}: got {key} {value!r}, expected text")


def check_whole(source: str, key: str, value: Any, least: int | None = None) -> None:
    """DataError where `value` is no whole number (true is none), or below `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise DataError(f"{source}: got {key} {value!r}, expected a whole number{bound}")
    if abs(value) > LARGEST:
        raise DataError(f"{source}: got {key} {value!r}, expected a whole number of at most {LARGEST} in size")


def check_names(place: str, names: Sequence[str]) -> None:
    """DataError where two columns have one name."""
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(
            f"{place}: got {count} columns named {name!r:.60}, expected a name of its own for each; rename them"
        )


def size_problem(values: Any, most: int = LARGEST_ROW) -> tuple[str, str] | None:
    """Why a row is too large, as (reason, message), or None where it is not.

    >>> size_problem({"prompt": "1 + 1?"}, most=5)
    ('too_large', 'the row has more than 5 characters, expected at most that; split it, or leave it out')
    """
    size = 0
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            size += len(value)
            if size > most:
                return (
                    "too_large",
                    f"the row has more than {most:,} characters, expected at most that; split it, or leave it out",
                )
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return None


def prompt_problem(values: Mapping[str, Any], column: str) -> tuple[str, str] | None:
    """Why this row gives no prompt, as (reason, message), or None where it does.

    >>> prompt_problem({"question": "1 + 1?"}, "prompt")
    ('missing_column', "no column 'prompt', got question; name the right one with prompt_column")
    """
    if column not in values:
        return "missing_column", f"no column {column!r}, got {listed(values)}; name the right one with prompt_column"
    prompt = values[column]
    if isinstance(prompt, str):
        return None if prompt.strip() else ("empty", f"column {column!r} is empty, expected text or messages")
    if prompt is None or (isinstance(prompt, list) and not prompt):
        return "empty", f"column {column!r} is empty, expected text or messages"
    if not isinstance(prompt, list):
        return "broken", f"column {column!r}: got a {type(prompt).__name__}, expected text or a list of messages"
    try:
        messages = clean_messages(prompt)
    except DataError as error:
        return "broken", f"column {column!r}: {error}"
    if not any(message["content"].strip() or "tool_calls" in message for message in messages):
        return "empty", f"column {column!r}: no message has text, expected one that asks for an answer"
    if messages[-1]["role"] == "assistant":
        return "broken", f"column {column!r}: the last message is the assistant's, expected one that asks for an answer"
    return None
