"""What `apportion doctor` says of one thing that it looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `level` is ok, warn (works, but) or fail (will not work); `mend` says what to do."""

    level: str
    what: str
    got: str
    mend: str = ""
