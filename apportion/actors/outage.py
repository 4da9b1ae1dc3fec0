"""Waiting for a service that is away: with growing pauses, within a budget, with one line at each end."""

from __future__ import annotations

import time
from collections.abc import Callable

from apportion.platform.notices import notify

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0


class Outage:
    """The outages of one service. `seconds` is the budget of each; a service that used it up is not waited for again
    until it has answered."""

    def __init__(self, name: str, key: str, seconds: float, say: Callable[[str], None] = notify) -> None:
        self._name, self.key, self.seconds, self._say = name, key, seconds, say
        self._since: float | None = None  # time.monotonic of the first request that nobody answered
        self._spent = False

    def wait(self, problem: str, since: float, until: float = float("inf")) -> bool:
        """Pause, then True: ask again. False where the budget is spent, or would be by `until` (time.monotonic).

        `since` is when the requests that just failed started.
        """
        if self._spent or self.seconds <= 0:
            return False
        if self._since is None:
            self._since = since
            self._say(
                f"{self._name} is away ({problem}); waiting up to {self.seconds:g} s for it ({self.key}), then its samples fail"
            )
        now = time.monotonic()
        left = min(self._since + self.seconds, until) - now
        if left <= 0:
            away, self._spent, self._since = now - self._since, True, None
            self._say(f"{self._name} is still away after {away:.0f} s ({problem}); its samples fail until it answers")
            return False
        time.sleep(min(max(FIRST_PAUSE_SECONDS, (now - self._since) / 2), LONGEST_PAUSE_SECONDS, left))
        return True

    def answered(self) -> None:
        """The service is there."""
        if self._since is not None:
            self._say(f"{self._name} answers again after {time.monotonic() - self._since:.0f} s")
        elif self._spent:
            self._say(f"{self._name} answers again")
        self._since, self._spent = None, False
