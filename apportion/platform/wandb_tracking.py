"""Weights & Biases as one of a run's trackers."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apportion.platform.errors import ConfigError
from apportion.platform.tracking import State, cell, one_line, plain


@dataclass
class WandbSettings:
    """`mode` is online or offline; `run_id` of a run that is resumed, otherwise None."""

    mode: str
    project: str
    run_name: str
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    run_id: str | None = None


class WandbTracker:
    """Weights & Biases. Its step is the run's, so a step that a resumed run repeats keeps its first numbers there.

    `config` must be free of secrets (see `known_secrets.redacted`); the API key is read by wandb from its own places.
    """

    name = "wandb"
    vital = False

    def __init__(self, folder: Path, settings: WandbSettings, config: Mapping[str, Any]) -> None:
        import wandb

        self._table = wandb.Table
        self.run_id = settings.run_id or secrets.token_hex(4)
        try:
            with _no_arguments():
                self._run = wandb.init(
                    project=settings.project,
                    entity=settings.entity,
                    name=settings.run_name,
                    tags=settings.tags,
                    id=self.run_id,
                    resume="allow",
                    mode=settings.mode,  # type: ignore[arg-type]
                    dir=str(folder),
                    config=dict(config),
                    settings=wandb.Settings(silent=True, console="off", finish_timeout=120, save_code=False),
                )
        except wandb.Error as error:
            raise ConfigError(
                f"tracking.wandb={settings.mode}: could not start ({one_line(error)}): run `wandb login`, or take "
                "tracking.wandb=offline or off"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        columns = list(rows[0])
        table = self._table(columns=columns, data=[[cell(row[column]) for column in columns] for row in rows])
        self._run.log({"samples": table}, step=step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(json.loads(json.dumps(summary, default=plain)))

    def warn(self, message: str) -> None:
        """Nothing: warnings are for the console and the metrics file."""

    def state(self) -> State:
        return {"run_id": self.run_id}

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _no_arguments() -> Iterator[None]:
    """wandb sends the words of the command line with a run, secrets and all; the configuration says the same without."""
    words = sys.argv
    sys.argv = words[:1]
    try:
        yield
    finally:
        sys.argv = words
