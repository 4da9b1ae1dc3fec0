"""The error of this room, and what is done about rows that cannot be used."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

POLICIES = ("error", "skip")
FAULTY_TEMPLATE = "faulty_template"  # the reason where a chat template is at fault: skipping rows does not help


class DataError(ValueError):
    """A source, row, prompt or built-in model that cannot be used: one line, with file and line where there is one."""


class UnusableError(DataError):
    """A row that cannot be used; `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnusableError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


def reason_of(error: DataError) -> str:
    """What a row that raised `error` is counted under."""
    return error.reason if isinstance(error, UnusableError) else "broken"


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` or an empty string.

    >>> nearest("arithmetc", ["arithmetic", "gym"])
    " (did you mean 'arithmetic'?)"
    """
    close = difflib.get_close_matches(name, [str(v) for v in valid], n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def listed(names: Iterable[str], most: int = 30) -> str:
    """Names of columns for a message of one line.

    >>> listed(["prompt", "two\\nlines", "c", "d"], most=3)
    "prompt, 'two\\\\nlines', c and 1 more"
    """
    every = list(names)
    shown = [name if name.isprintable() and len(name) <= 40 else repr(name[:40]) for name in every[:most]]
    return ", ".join(shown) + (f" and {len(every) - most} more" if len(every) > most else "")


@dataclass
class BadRows:
    """What happens to a row that cannot be used: an error, or skipping that is counted by reason."""

    policy: str = "error"
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise DataError(f"on_bad_row: got {self.policy!r}, expected one of {', '.join(POLICIES)}")

    def reject(self, reason: str, message: str) -> None:
        """Raise DataError(message), or count the row under `reason` and go on."""
        if self.policy == "error" or reason == FAULTY_TEMPLATE:
            raise DataError(message)
        self.counts[reason] += 1
