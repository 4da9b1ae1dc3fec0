"""What a person sees while a run goes on: a live table on a terminal, plain lines in a log.

What a model wrote is shown as text: no markup, no control characters, no escape sequences.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from apportion.platform.messages import plain_text, terminal_text

__all__ = ["ConsoleTracker", "plain_text", "safe_text", "terminal_text"]

ROWS_SHOWN = 12
_COLUMNS = ("step", "reward", "accuracy", "length", "KL", "tokens/s", "time left")


def safe_text(text: str, limit: int | None = None) -> str:
    """A model's text on one line, harmless to a terminal and to rich's markup; cut to `limit` characters.

    >>> safe_text("[red]4\\x1b[2J\\n2")
    '\\\\[red]4 2'
    """
    plain = plain_text(text)
    if limit is not None and len(plain) > limit:
        plain = plain[: limit - 1] + "…"
    return escape(plain)


class ConsoleTracker:
    """A live table where there is a terminal, otherwise one plain line a step.

    `KL` is that to the reference where there is one, otherwise that of the step (`approx_kl`). `accuracy` is that of
    the last evaluation. The time left is the mean of the last ten steps times the steps that remain.
    """

    name = "console"
    vital = False

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._total = total_steps
        self._rows: deque[tuple[str, ...]] = deque(maxlen=ROWS_SHOWN)
        self._seconds: deque[float] = deque(maxlen=10)
        self._accuracy: float | None = None
        self._status = ""
        self._sample = ""
        self._started = self._last_time = time.monotonic()
        self._last_step = start_step
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, auto_refresh=False, transient=False)
            self._live.start(refresh=True)

    def status(self, text: str) -> None:
        """What the run is doing now, below the table; nothing in a log."""
        self._status = text
        self._refresh()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if step > self._last_step:
            self._seconds.append(metrics["timing/step"] if "timing/step" in metrics else now - self._last_time)
        self._last_time, self._last_step = now, step
        if "eval/greedy_accuracy" in metrics:
            self._accuracy = metrics["eval/greedy_accuracy"]
        row = self._row(step, metrics)
        self._rows.append(row)
        if self._live is None:
            words = [f"{name} {value}" for name, value in zip(_COLUMNS[1:], row[1:], strict=True) if value]
            self._console.print(Text(f"step {row[0]}  " + "  ".join(words)), soft_wrap=True)
        self._refresh()

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first sample's text is shown below the table."""
        if rows:
            row = rows[0]
            words = " → ".join(plain_text(str(row[key]))[:160] for key in ("prompt", "response", "text") if key in row)
            self._sample = f"sample of step {step}: {words}"
        self._refresh()

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Nothing but the end of the table: the command says how the run ended."""
        self._stop_live()

    def warn(self, message: str) -> None:
        self._console.print(Text(f"warning: {plain_text(message)}", style="yellow"), soft_wrap=True)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._stop_live()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._status = self._sample = ""
            self._live.update(self._picture(), refresh=True)
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def _row(self, step: int, metrics: Mapping[str, float]) -> tuple[str, ...]:
        def shown(name: str, form: str) -> str:
            return _number(metrics[name], form) if name in metrics else ""

        left = self._total - step
        seconds = sum(self._seconds) / len(self._seconds) * left if self._seconds else None
        return (
            f"{step}/{self._total}",
            shown("reward/mean", ".3f"),
            _number(self._accuracy, ".3f"),
            shown("rollout/response_tokens_mean", ".1f"),
            shown("policy/kl_reference", ".4f") or shown("policy/approx_kl", ".4f"),
            shown("perf/rollout_tokens_per_second", ".0f"),
            "" if seconds is None else _clock(seconds),
        )

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in _COLUMNS:
            table.add_column(column, justify="right")
        for row in self._rows:
            table.add_row(*row)
        below = [
            Text(text, style="dim", overflow="ellipsis", no_wrap=True) for text in (self._sample, self._status) if text
        ]
        return Group(table, *below)


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(float(value), form)


def _clock(seconds: float) -> str:
    """
    >>> _clock(3725)
    '1:02:05'
    """
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
