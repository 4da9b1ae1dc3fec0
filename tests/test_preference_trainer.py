"""The end of a preference stage: by its minutes, with its last evaluation and checkpoint."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from apportion.actors.preference import StepReport
from apportion.batch import Totals
from apportion.platform.checkpoint import CheckpointStore
from apportion.preference_trainer import PreferenceTrainer, StageSettings


class Stage(PreferenceTrainer):
    """A step takes 1 s, an evaluation 3 s and a checkpoint 20 s on the clock; ranks have nothing to do."""

    said: list[str]  # what was waited for

    def _shares(self, examples):
        return []

    def _gather(self, calls, what):
        self.said.append(what)
        self.clock.now += {"update": 1.0, "checkpoint": 20.0}[what.split()[0]]
        return [StepReport(Totals(), None, 4)] if what.startswith("update") else []

    def _metrics(self, reports):
        return {}

    def _evaluate(self):
        self.clock.now += 3.0
        return {"eval/pair_accuracy": 0.5}


class Examples(list):
    """So many of them, with a digest."""

    digest = 7


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    """Of nine steps and 12 s, with a checkpoint after each step and an evaluation after the last."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("apportion.preference_trainer.time", clock)
    settings = StageSettings("x", 1.0, 9, 2, 0, False, False, None, 0, False, True, 60.0, 0.2, 1, None, True, {})
    rows = {}
    tracker = SimpleNamespace(log=lambda step, metrics: rows.update({step: metrics}), state=dict)
    made = Stage([], Examples([0] * 18), [0], settings, tracker, CheckpointStore(tmp_path))
    made.clock, made.rows, made.said = clock, rows, []
    return made


def test_time_that_runs_out_during_a_checkpoint_does_not_lose_the_last_evaluation(stage):
    progress = stage.run()
    assert progress.step == 2 and progress.after == {"eval/pair_accuracy": 0.5}
    assert [stage.rows[step]["timing/step"] for step in (1, 2)] == [1.0, 1.0]
    assert "eval/pair_accuracy" not in stage.rows[1] and progress.wall_seconds == 45.0


def test_a_resumed_stage_has_all_its_minutes_again_and_writes_no_checkpoint_twice(stage):
    stage.run()
    found = stage.store.latest()
    again = Stage([], stage.train, [0], stage.settings, stage.tracker, CheckpointStore(stage.store.root))
    again.clock, again.said = stage.clock, []
    again._gather = lambda calls, what: None if what.startswith("resume") else Stage._gather(again, calls, what)
    again.restore(found.path, found.state)
    assert again.store.current == 2
    assert (again.progress.after, again.progress.metrics) == (stage.progress.after, stage.progress.metrics)
    assert again.progress.after == {"eval/pair_accuracy": 0.5}
    assert again.run().step == 4 and again.store.steps() == [3, 4]


def test_a_stage_writes_a_checkpoint_once_its_minutes_have_passed(stage):
    settings = replace(
        stage.settings, max_minutes=None, checkpoint_every=0, checkpoint_minutes=0.05, evaluate_after=False
    )
    timed = Stage([], stage.train, None, settings, stage.tracker, CheckpointStore(stage.store.root))
    timed.clock, timed.said = stage.clock, []
    timed.run()
    waits = [what for what in timed.said if what.startswith("checkpoint")]
    assert waits == ["checkpoint of step 3", "checkpoint of step 6", "checkpoint of step 9"]
    assert timed.said[:4] == ["update of step 1", "update of step 2", "update of step 3", "checkpoint of step 3"]
    assert timed.store.steps() == [6, 9]
