"""When a checkpoint is due."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckpointSchedule:
    """After every so many steps, and whenever so many minutes have passed since the last one, or since the run was
    started or resumed. It is asked after each step. 0 steps, and 0 or None minutes, switch either rule off.

    `now` is seconds on the driver's clock.
    """

    every_steps: int
    every_minutes: float | None
    _since: float = 0.0

    def restart(self, now: float) -> None:
        """The run starts, or a checkpoint is whole."""
        self._since = now

    def due(self, step: int, now: float) -> bool:
        if self.every_steps and step % self.every_steps == 0:
            return True
        return bool(self.every_minutes) and now - self._since >= 60 * (self.every_minutes or 0.0)
