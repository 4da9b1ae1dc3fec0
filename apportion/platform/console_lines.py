"""One plain line a step with every number but times: for runs that the live table's columns do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apportion.platform.messages import say

_HIDDEN = ("timing/", "perf/")


class ConsoleLines:
    """`step 3/20  dpo/loss 0.6931  dpo/accuracy 0.5`; meets the protocol of a tracker."""

    name = "console"
    vital = False

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith(_HIDDEN)]
        seconds = f"  {metrics['timing/step']:.1f} s" if "timing/step" in metrics else ""
        say(f"step {step}/{self._total}  {'  '.join(shown)}{seconds}")

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: these runs have none."""

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Nothing: the command prints it."""

    def warn(self, message: str) -> None:
        say(f"warning: {message}")

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing is open."""
