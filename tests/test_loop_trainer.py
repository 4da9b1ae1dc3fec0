"""The run around its steps: when it ends, what it evaluates and keeps, and what a resumed run goes on from."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from apportion.actors.credit import CreditReport, CutReport, EvaluationReport
from apportion.actors.scoring import ScoreReport
from apportion.algorithms.kl import KlCoefficient
from apportion.batch import Totals
from apportion.data.errors import DataError
from apportion.loop.resume import check_steps_left
from apportion.loop.state import Actors, Experience, LoopSettings
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import ClusterLost, ConfigError, RewardError
from apportion.platform.errors import DataError as ActorDataError
from apportion.platform.metric_names import unknown_metrics
from apportion.trainer import Trainer


class Prompts:
    """A stream whose position is the number of batches drawn; `bad` is the first batch with a row that cannot be used."""

    def __init__(self, bad: int | None = None) -> None:
        self.drawn, self.bad, self.skipped = 0, bad, {"too_long": 2, "empty": 1}
        self.reasoning_left_out = 0

    def next_batch(self, prompts: int | None = None) -> list:
        self.drawn += 1
        if self.drawn == self.bad:
            raise DataError("questions.jsonl:7: got a prompt of 900 tokens, expected at most 512")
        return []

    def state(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


class Tracker:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.warnings: list[str] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        assert step not in self.rows
        self.rows[step] = dict(metrics)

    def log_samples(self, step: int, rows: list) -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def state(self) -> dict:
        return {}


class Evaluator:
    """Accuracies in the order asked for; an exception among them is raised."""

    def __init__(self, *accuracies, every_steps: int = 0) -> None:
        self.settings = SimpleNamespace(before=True, after=True, every_steps=every_steps)
        self.left, self.asked = list(accuracies), []

    def evaluate(self, when: str) -> EvaluationReport:
        self.asked.append(when)
        accuracy = self.left.pop(0)
        if isinstance(accuracy, Exception):
            raise accuracy
        known = {} if accuracy is None else {"eval/greedy_accuracy": accuracy}
        return EvaluationReport(known, [{"prompt_id": "q", "answer": when, "reward": accuracy}])


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Loop(Trainer):
    """The trainer with stages that take `seconds_of` on the clock and do nothing else, but for drawing prompts."""

    def _takes(self, stage: str) -> None:
        with self._timed(stage):
            self.clock.now += self.seconds_of.get(stage, 0.0)

    def _sync(self) -> None:
        self._sent = {"weights/bytes": 8}

    def _collect(self) -> Experience:
        self.prompts.next_batch()
        self._takes("rollout")
        totals = Totals()
        for name in ("reward/mean", "reward/square", "rollout/response_tokens_mean"):
            totals.add(name, 4.0, 4)
        return Experience([], 1, totals, 0.0)

    def _cut(self, experience):
        return [], CutReport(4, 40, 1)

    def _signals(self, shards):
        return []

    def _credit(self, shards, signals):
        return [], CreditReport(dict(self.credited))

    def _update(self, shards, minibatches):
        self._takes("update")
        return [], []

    def _evaluate(self, evaluator):
        self._takes("evaluate")
        return super()._evaluate(evaluator)

    def checkpoint(self):
        self._takes("checkpoint")
        return super().checkpoint()


@pytest.fixture
def make(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("apportion.trainer.time", clock)

    def make(prompts: Prompts | None = None, evaluator: Evaluator | None = None, **changes) -> Loop:
        values = {"steps": 2, "max_minutes": None, "checkpoint_every": 0, "checkpoint_minutes": None} | changes
        values.setdefault("checkpoint_final", True)
        settings = LoopSettings(
            prompts_per_step=1, responses_per_prompt=4, sampling=None, minibatches=1, policy_signals=False, selects=False,
            max_failed_share=0.1, sync_check=True, sync_unproved=[], call_timeout_seconds=1.0, critic_only_steps=0, samples_shown=0,
            seeds={"run": 0}, ranks={"policy": {"ranks": 2}}, max_failed_critiques=0.5, parts=1, **values,
        )  # fmt: skip
        actors, store = Actors([], [], None, []), CheckpointStore(tmp_path / "checkpoints")
        loop = Loop(actors, prompts or Prompts(), settings, KlCoefficient(0.0), Tracker(), store)
        loop.evaluator, loop.clock, loop.credited = evaluator, clock, {}
        loop.seconds_of = {"rollout": 4.0, "update": 6.0, "evaluate": 30.0, "checkpoint": 5.0}
        return loop

    return make


def saved(loop: Loop) -> RunState:
    found = loop.store.latest()
    assert found is not None
    return found.state


def resumed(loop: Loop, state: RunState) -> Loop:
    loop.restore(loop.store.root, state)
    return loop


def test_a_row_has_the_seconds_of_its_evaluation_and_of_the_checkpoint_before_it(make):
    loop = make(evaluator=Evaluator(0.25, 0.5, 0.75, every_steps=1), checkpoint_every=1)
    loop.run()
    rows = loop.tracker.rows
    assert rows[0] == {"eval/greedy_accuracy": 0.25, "timing/evaluate": 30.0}
    timing = [{n: v for n, v in rows[step].items() if n.startswith("timing/")} for step in (1, 2)]
    stages = {"timing/rollout": 4.0, "timing/update": 6.0, "timing/step": 10.0, "timing/other": 0.0}
    assert timing == [stages | {"timing/evaluate": 30.0}, stages | {"timing/evaluate": 30.0, "timing/checkpoint": 5.0}]
    assert loop.progress.stage_seconds["checkpoint"] == 10.0 and unknown_metrics(rows[2]) == []


def test_rows_that_were_left_out_are_counted_by_reason(make):
    loop = make(steps=1)
    loop.run()
    row = loop.tracker.rows[1]
    counted = {name: value for name, value in row.items() if name.startswith("data/")}
    assert counted == {"data/skipped": 3, "data/skipped/too_long": 2, "data/skipped/empty": 1}


def test_an_accuracy_and_a_reward_that_are_not_known_do_not_keep_a_run_from_its_checkpoint(make):
    loop = make(evaluator=Evaluator(None, 0.5))
    progress = loop.run()
    state = saved(loop)
    assert (progress.accuracy_before, progress.accuracy_after) == (None, 0.5)
    assert (state.extra["accuracy_before"], state.extra["accuracy_after"]) == (None, 0.5)
    assert [a["reward"] for a in state.extra["answers_before"]] == [None]
    assert state.extra["answers_after"] == [{"prompt_id": "q", "answer": "evaluation after step 2", "reward": 0.5}]


def test_the_last_checkpoint_replaces_one_of_the_same_step_that_another_life_of_the_run_left(make):
    stale = make()
    stale.prompts.drawn = 50
    stale.run()
    assert saved(stale).data == {"drawn": 52}
    loop = make()
    loop.run()
    assert saved(loop).data == {"drawn": 2} and saved(loop).ranks == {"policy": {"ranks": 2}}


def test_a_step_that_has_its_checkpoint_is_not_written_again_at_the_end(make, monkeypatch):
    loop = make(checkpoint_every=2)
    loop.run()
    assert loop.progress.stage_seconds["checkpoint"] == 5.0
    again = resumed(make(steps=2), saved(loop))
    again.run()
    assert again.tracker.rows == {} and again.progress.stage_seconds["checkpoint"] == 5.0


def written(loop: Loop) -> list[int]:
    """Steps after which a checkpoint was written, in order."""
    steps: list[int] = []
    write = loop.checkpoint

    def checkpoint():
        steps.append(loop.progress.step)
        return write()

    loop.checkpoint = checkpoint
    loop.run()
    return steps


def test_a_checkpoint_is_written_once_its_minutes_of_training_have_passed_and_the_newest_two_are_kept(make):
    loop = make(steps=13, checkpoint_minutes=0.5, checkpoint_final=False)  # steps take 10 s, checkpoints 5
    assert written(loop) == [3, 6, 9, 12]
    assert loop.store.steps() == [9, 12]
    assert written(make(steps=13, checkpoint_minutes=0.5, checkpoint_every=5, checkpoint_final=False)) == [
        3,
        5,
        8,
        10,
        13,
    ]
    assert written(make(steps=5, checkpoint_minutes=0.0)) == written(make(steps=5)) == [5]


def test_the_minutes_of_a_resumed_run_begin_when_it_is_resumed(make):
    loop = make(steps=4, checkpoint_minutes=0.5, checkpoint_final=False)
    assert written(loop) == [3]
    again = resumed(make(steps=8, checkpoint_minutes=0.5, checkpoint_final=False), saved(loop))
    again.clock.now += 1000.0  # nobody trained
    assert written(again) == [6]


def test_a_wait_names_the_step_that_it_is_for(make, monkeypatch):
    said = []
    monkeypatch.setattr("apportion.trainer.gather", lambda calls, seconds, what: said.append(what) or [])
    loop = make(steps=1)
    loop.run()
    resumed(make(), saved(loop))
    Trainer._update(loop, [], 1)
    assert said == ["checkpoint of step 1", "resume from step 1", "update of step 2"]


def test_an_end_that_is_known_from_the_checkpoint_is_true_until_the_next_step(make):
    loop = make(evaluator=Evaluator(0.25, 0.75))
    loop.run()
    state = saved(loop)
    unchanged = resumed(make(), state).progress
    assert (unchanged.accuracy_after, unchanged.answers_after[0]["reward"]) == (0.75, 0.75)
    assert unchanged.metrics == loop.progress.metrics and unchanged.metrics["timing/step"] > 0
    further = resumed(make(steps=3), state)
    further.run()
    assert (further.progress.accuracy_before, further.progress.accuracy_after) == (0.25, None)
    assert further.progress.answers_after == []


def test_a_run_with_no_step_left_is_refused_by_the_name_of_the_key(make, tmp_path):
    loop = make()
    loop.run()
    check_steps_left(saved(loop), 3, tmp_path)
    check_steps_left(saved(loop), 2, tmp_path)  # it ended without its summary, which is still to be written
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        check_steps_left(saved(loop), 2, tmp_path)
    assert str(refused.value) == (
        "resume: got a checkpoint of step 2 of 2, so nothing is left to do; expected train.steps above 2"
    )


def test_the_minutes_are_those_of_each_start_so_that_a_resumed_run_has_all_of_them_again(make):
    loop = make(steps=9, max_minutes=0.3)  # 18 s, steps take 10
    loop.run()
    assert loop.progress.step == 2 and loop.progress.wall_seconds == 25.0
    again = resumed(make(steps=9, max_minutes=0.3), saved(loop))
    again.run()
    assert again.progress.step == 4 and sorted(again.tracker.rows) == [3, 4]
    assert again.progress.wall_seconds == 50.0


def test_time_that_runs_out_during_a_checkpoint_does_not_lose_the_last_evaluation(make):
    loop = make(evaluator=Evaluator(0.25, 0.75), steps=9, max_minutes=0.2, checkpoint_every=1)
    loop.seconds_of |= {"rollout": 1.0, "update": 1.0, "evaluate": 0.0, "checkpoint": 20.0}  # 12 s in all
    loop.run()
    assert loop.progress.step == 2 and loop.progress.accuracy_after == 0.75
    assert loop.evaluator.asked == ["evaluation after step 0", "evaluation after step 2"]


def test_a_row_that_cannot_be_used_leaves_a_checkpoint_from_which_the_step_is_drawn_again(make):
    loop = make(Prompts(bad=3), steps=9)
    with pytest.raises(DataError, match=r"questions.jsonl:7"):
        loop.run()
    state = saved(loop)
    assert (state.step, state.data) == (2, {"drawn": 2}) and sorted(loop.tracker.rows) == [1, 2]
    first = make(Prompts(bad=1), steps=9)
    first.store.root = first.store.root.parent / "other"
    with pytest.raises(DataError):
        first.run()
    assert first.store.steps() == []  # nothing was trained


def test_a_row_that_an_actor_finds_unusable_leaves_a_checkpoint_too(make, monkeypatch):
    loop = make(steps=9)
    whole = loop._collect

    def collect():
        if loop.progress.step == 2:
            raise ActorDataError("rollout.response_column: prompt 7 has NoneType in 'chosen', expected text")
        return whole()

    monkeypatch.setattr(loop, "_collect", collect)
    with pytest.raises(ActorDataError, match="prompt 7 has NoneType"):
        loop.run()
    assert saved(loop).step == 2


@pytest.mark.parametrize(("stage", "step"), [("_collect", 1), ("_credit", 1), ("_update", None)])
def test_a_run_whose_ray_is_lost_saves_the_last_step_unless_an_update_is_under_way(make, monkeypatch, stage, step):
    loop = make(steps=9)
    whole = getattr(loop, stage)

    def lost(*arguments):
        if loop.progress.step == 1:
            raise ClusterLost("Ray's control server (GCS) (pid 7) died")
        return whole(*arguments)

    monkeypatch.setattr(loop, stage, lost)
    with pytest.raises(ClusterLost, match="pid 7"):
        loop.run()
    assert loop.store.steps() == ([] if step is None else [step])
    assert [("saving" in said, "cannot be saved" in said) for said in loop.tracker.warnings] == [
        (step is not None, step is None)
    ]


def test_held_out_rewards_that_fail_are_said_and_the_training_goes_on(make):
    loop = make(evaluator=Evaluator(0.25, RewardError("evaluation after step 1: ..."), 0.75, every_steps=1), steps=2)
    loop.run()
    assert saved(loop).step == 2 and sorted(loop.tracker.rows) == [0, 1, 2]
    assert loop.tracker.warnings == ["evaluation after step 1: ..."]
    assert "eval/greedy_accuracy" not in loop.tracker.rows[1]
    assert loop.progress.accuracy_after == 0.75


def test_held_out_rewards_that_fail_before_the_first_step_stop_the_run(make):
    with pytest.raises(RewardError):
        make(evaluator=Evaluator(RewardError("evaluation after step 0: ...")), steps=2).run()


def test_a_step_logs_the_coefficient_it_had_and_a_resumed_run_goes_on_from_the_next(make):
    """KL 5 of a target of 1 is the largest error, 0.2; 4 trajectories of a horizon of 10: 8% more each step."""

    def steered(**changes) -> Loop:
        loop = make(**changes)
        loop.kl, loop.credited = KlCoefficient(0.1, target=1.0, horizon=10), {"policy/kl_reference": 5.0}
        return loop

    loop = steered()
    loop.run()
    logged = [loop.tracker.rows[step]["policy/kl_coefficient"] for step in (1, 2)]
    assert logged == pytest.approx([0.1, 0.108])
    assert saved(loop).kl == {"coefficient": pytest.approx(0.11664)}
    again = resumed(steered(steps=3), saved(loop))
    again.run()
    assert again.tracker.rows[3]["policy/kl_coefficient"] == pytest.approx(0.11664)
    assert saved(again).kl == {"coefficient": pytest.approx(0.1259712)}


def test_a_coefficient_stays_where_no_reference_was_asked(make):
    loop = make()
    loop.kl = KlCoefficient(0.1, target=1.0, horizon=10)
    loop.run()
    assert [loop.tracker.rows[step]["policy/kl_coefficient"] for step in (1, 2)] == [0.1, 0.1]


def away(loop: Loop, steps: list[int], max_failed: float = 1.0) -> Loop:
    """In `steps` the reward service is away and no sample has a reward."""
    loop.failures.max_failed_rewards = max_failed
    collect = loop._collect

    def collected() -> Experience:
        experience = collect()
        if loop.progress.step + 1 in steps:
            loop.failures.count_rewards(ScoreReport(samples=4, failed=Counter(away=4), first_traceback="s: http://h/r"))
            experience.groups = 0
            loop.failures.check()
            loop.failures.check_groups(0, rewarded=0.0)
        return experience

    loop._collect = collected
    return loop


def test_a_step_whose_reward_service_is_away_trains_nothing_and_the_run_goes_on_if_all_may_fail(make):
    loop = away(make(steps=3, checkpoint_every=1), [2])
    progress = loop.run()
    assert (progress.step, progress.policy_version, progress.samples) == (3, 2, 8)
    row = loop.tracker.rows[2]
    assert (row["reward/failed_share"], row["reward/failed/away"], row["weights/version"]) == (1.0, 1.0, 1)
    assert "reward/mean" not in row and unknown_metrics(row) == [] and loop.store.steps() == [2, 3]
    assert loop.tracker.warnings == ["step 2: no sample has a reward, so nothing is trained"]
    with pytest.raises(RewardError, match=r"100% of this step's samples failed, .*the first failure:\ns: http://h/r$"):
        away(make(steps=3), [2], 0.5).run()
