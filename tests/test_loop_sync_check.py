"""The behavioral check of syncs: when it measures, what it allows, and what a resumed run compares with.

The model is one number. Its log-probs of a text fall with it, so an engine that keeps an earlier number shows.
"""

import pickle

import numpy as np
import pytest
from transformers import AutoTokenizer

from apportion.actors.credit import CreditReport, CutReport
from apportion.algorithms.kl import KlCoefficient
from apportion.batch import Totals
from apportion.loop.state import Actors, Experience, LoopSettings, Progress
from apportion.loop.sync_check import SyncCheck, is_due, text_tokens
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.cluster import Call
from apportion.platform.errors import WeightSyncError
from apportion.platform.metric_names import unknown_metrics
from apportion.platform.weights import SyncReceipt, WeightBundle
from apportion.trainer import Trainer

IDS = np.array([5, 9, 7, 11], np.int32)


class Scripted:
    """An actor that answers `score` with what a test puts in `scores`, and keeps what it was sent."""

    def __init__(self, name, *scores):
        self.name, self.scores, self.sent = name, np.array(scores, np.float32), []

    def call(self, method, token_ids):
        assert method == "score"
        self.sent.append(token_ids.tolist())
        return Call(self, method, [self.scores])


@pytest.fixture(autouse=True)
def answered_in_place(monkeypatch):
    def answers(calls, seconds, what):
        return [call.refs[0] for call in calls]

    monkeypatch.setattr("apportion.loop.sync_check.gather", answers)
    monkeypatch.setattr("apportion.trainer.gather", answers)


def check_of(ranks, engines, max_gap=None, warn=pytest.fail):
    return SyncCheck(Actors(engines, [], None, ranks), IDS, max_gap, 60.0, warn)


def test_the_first_three_steps_and_every_tenth_are_checked():
    assert [version for version in range(41) if is_due(version)] == [0, 1, 2, 3, 10, 20, 30, 40]


def test_the_first_sync_of_a_process_is_checked_whatever_its_version():
    rank, engine = Scripted("policy-0", -1, -2, -3), Scripted("rollout-0", -1, -2, -3)
    check = check_of([rank], [engine])
    measured = []
    for version in range(5, 12):
        check.after_sync(Progress(policy_version=version, sync_baseline=0.0))
        measured.append(check.taken())
    assert [version for version, found in zip(range(5, 12), measured, strict=True) if found] == [5, 10]
    assert measured[0] == {"sync/gap": 0.0} and rank.sent == engine.sent == [IDS.tolist()] * 2


def test_the_gap_is_the_mean_over_tokens_of_the_engine_that_differs_most():
    ranks = [Scripted("policy-0", -1, -2, -3), Scripted("policy-1", -1, -2, -3)]
    engines = [
        Scripted("rollout-0", -1, -2, -3),
        Scripted("rollout-1", -1.03, -1.97, -3),
        Scripted("rollout-2", -1, -2, -3.01),
    ]
    check, progress = check_of(ranks, engines), Progress()
    check.measure_baseline(progress)
    assert progress.sync_baseline == pytest.approx(0.02, abs=1e-6)
    assert check.taken() == {"sync/baseline": progress.sync_baseline} and check.taken() == {}
    assert all(actor.sent == [IDS.tolist()] for actor in [*ranks, *engines])
    check.measure_baseline(progress)  # it is known
    assert check.taken() == {} and len(ranks[0].sent) == 1


@pytest.mark.parametrize(
    ("baseline", "max_gap", "gap", "bound"),
    [
        (0.0, None, 0.019, None),
        (0.0, None, 0.021, "expected at most 0.0200 (the smallest bound; 0.0000 before the first sync)"),
        (0.003, None, 0.019, None),
        (0.003, None, 0.021, "expected at most 0.0200 (the smallest bound; 0.0030 before the first sync)"),
        (0.01, None, 0.049, None),
        (0.01, None, 0.051, "expected at most 0.0500 (5 times the 0.0100 before the first sync)"),
        (0.01, 0.3, 0.29, None),
        (0.01, 0.3, 0.31, "expected at most 0.3000 (train.max_sync_gap; 0.0100 before the first sync)"),
        (0.01, 0.005, 0.006, "expected at most 0.0050 (train.max_sync_gap; 0.0100 before the first sync)"),
    ],
)
def test_a_gap_may_be_five_baselines_or_what_is_set(baseline, max_gap, gap, bound):
    check = check_of([Scripted("policy-0", -1, -2)], [Scripted("rollout-0", -1 - gap, -2 + gap)], max_gap)
    progress = Progress(policy_version=2, sync_baseline=baseline)
    if bound is None:
        check.after_sync(progress)
        assert check.metrics["sync/gap"] == pytest.approx(gap, abs=1e-6)
        return
    with pytest.raises(WeightSyncError) as stopped:
        check.after_sync(progress)
    assert str(stopped.value) == (
        "rollout-0: after the sync of weights version 2, the log-probs of a fixed text differ from the trainer's by "
        f"{gap:.4f} nats a token on average, {bound}: the engine does not compute with the trainer's weights, and would "
        "sample from another policy; if only the arithmetic differs, set model.dtype=float32, another model.attention, or "
        "train.max_sync_gap above this gap"
    )


@pytest.mark.parametrize("odd", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["policy-0", "rollout-1"])
def test_log_probs_that_are_no_finite_numbers_stop_the_run_and_name_who_has_them(name, odd):
    actors = [Scripted(n, -1, odd if n == name else -2, -3) for n in ("policy-0", "rollout-0", "rollout-1")]
    check = check_of(actors[:1], actors[1:], max_gap=1e9)
    for measure, when in (
        (check.measure_baseline, "before the first sync"),
        (check.after_sync, "after the sync of weights version 1"),
    ):
        with pytest.raises(WeightSyncError, match=rf"^{name}: {when}, 1 of 3 log-probs of a fixed text are not finite"):
            measure(Progress(policy_version=1))


def test_a_large_baseline_is_a_warning():
    warned = []
    close = check_of([Scripted("policy-0", -1, -2)], [Scripted("rollout-0", -1.09, -2.09)], warn=warned.append)
    close.measure_baseline(Progress())
    assert warned == []
    far = check_of([Scripted("policy-0", -1, -2)], [Scripted("rollout-0", -1.2, -2.2)], warn=warned.append)
    far.measure_baseline(Progress())
    assert len(warned) == 1 and "\n" not in warned[0]
    assert warned[0].startswith("rollout-0: before the first sync, ") and "by 0.2000 nats a token" in warned[0]


def test_without_two_tokens_nothing_is_asked():
    actors = Actors([None], [], None, [None])
    for check in (SyncCheck.off(actors), SyncCheck(actors, IDS[:1], None, 60.0, pytest.fail)):
        progress = Progress()
        check.measure_baseline(progress)
        check.after_sync(progress)
        assert progress.sync_baseline is None and check.taken() == {}


def test_the_text_is_plain_and_fits_the_context_and_the_vocabulary(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None  # as a base model's
    whole = text_tokens(tokenizer, 10_000, None)
    assert whole.dtype == np.int32 and 24 <= len(whole) <= 64
    assert tokenizer.decode(whole, skip_special_tokens=True).startswith("The capital of France")
    assert text_tokens(tokenizer, 10_000, 264).tolist() == whole.tolist()
    assert text_tokens(tokenizer, 7, 264).tolist() == whole[:7].tolist()
    few = text_tokens(tokenizer, 10_000, int(np.median(whole)))
    assert len(few) >= 2 and few.max() < np.median(whole)


# in a run


class Rank:
    """Trains its number up by one a step."""

    def __init__(self):
        self.value, self.asked = 0.0, []

    def weights(self, version):
        self.asked.append("weights")
        return WeightBundle.pack([("value", _tensor(self.value))], version).entries, pickle.dumps(self.value)

    def score(self, token_ids):
        self.asked.append("score")
        return _logprobs(self.value, token_ids)

    def save(self, folder):
        with open(f"{folder}/value", "w") as file:
            file.write(str(self.value))

    def load(self, folder):
        self.asked.append("load")
        with open(f"{folder}/value") as file:
            self.value = float(file.read())


class Engine:
    """Says that it holds what it was sent, and does not take it in after version `stuck_after`. Rounds by `noise`."""

    def __init__(self, noise=0.0, stuck_after=10**9):
        self.value, self.noise, self.stuck_after = 0.0, noise, stuck_after

    def load_weights(self, sent, check):
        value = pickle.loads(sent)
        version = int(value)
        self.value = value if version <= self.stuck_after else self.value
        sums = {e.name: e.checksum for e in _entries(value)}
        return SyncReceipt("rollout-0", version, sums, 1, [], list(sums))

    def score(self, token_ids):
        return _logprobs(self.value, token_ids) + np.float32(self.noise)


def _tensor(value):
    import torch

    return torch.tensor([value], dtype=torch.float32)


def _entries(value):
    return WeightBundle.pack([("value", _tensor(value))], 0).entries


def _logprobs(value, token_ids):
    return np.full(len(token_ids) - 1, -1.0 - 0.1 * value, np.float32)


class InPlace:
    def __init__(self, name, target):
        self.name, self.target = name, target

    def call(self, method, *arguments, returns=1):
        return Call(self, method, [getattr(self.target, method)(*arguments)])


class Prompts:
    skipped: dict[str, int] = {}
    reasoning_left_out = 0

    def state(self):
        return {}

    def load_state(self, state): ...


class Tracker:
    def __init__(self):
        self.rows, self.warn = {}, pytest.fail

    def log(self, step, row):
        self.rows[step] = row

    def log_samples(self, step, samples): ...

    def state(self):
        return {}


class Loop(Trainer):
    """The trainer with real syncs, checkpoints and rows; an update adds one to the policy's number."""

    def _collect(self):
        totals = Totals()
        for name in ("reward/mean", "reward/square"):
            totals.add(name, 1.0, 1)
        with self._timed("rollout"):
            return Experience([], 1, totals, 0.0)

    def _cut(self, experience):
        return [], CutReport(1, 1, 1)

    def _signals(self, shards):
        return []

    def _credit(self, shards, signals):
        return [], CreditReport({})

    def _update(self, shards, minibatches):
        with self._timed("update"):
            self.actors.policy[0].target.value += 1
            return [], []


@pytest.fixture
def make(tmp_path):
    def make(steps, noise=0.0, stuck_after=10**9, **changes):
        settings = LoopSettings(
            steps=steps, prompts_per_step=1, responses_per_prompt=1, sampling=None, minibatches=1, policy_signals=False,
            selects=False, max_failed_share=0.1, sync_check=True, sync_unproved=[], call_timeout_seconds=1.0, critic_only_steps=0,
            samples_shown=0, max_minutes=None, checkpoint_every=0, checkpoint_minutes=None, checkpoint_final=True, seeds={"run": 0}, ranks={},
            max_failed_critiques=0.5, parts=1,
        )  # fmt: skip
        actors = Actors([InPlace("rollout-0", Engine(noise, stuck_after))], [], None, [InPlace("policy-0", Rank())])
        store = CheckpointStore(tmp_path / "checkpoints")
        loop = Loop(actors, Prompts(), settings, KlCoefficient(0.0), Tracker(), store)
        loop.sync_check = SyncCheck(actors, IDS, changes.get("max_gap"), 60.0, pytest.fail)
        return loop

    return make


def resumed(loop, state=None):
    found = loop.store.latest()
    loop.restore(found.path, state or found.state)
    return loop


def measured(loop):
    return {
        step: {name: round(value, 4) for name, value in row.items() if name in ("sync/gap", "sync/baseline")}
        for step, row in loop.tracker.rows.items()
    }


def test_rows_have_the_gap_where_it_was_measured_and_the_baseline_once(make):
    loop = make(12, noise=0.003)
    loop.run()
    gap = {"sync/gap": 0.003}
    expected = {step: gap if step in (2, 3, 10) else {} for step in range(2, 13)}
    assert measured(loop) == {1: gap | {"sync/baseline": 0.003}} | expected
    assert unknown_metrics(loop.tracker.rows[1]) == []
    assert loop.actors.policy[0].target.asked[:3] == ["score", "weights", "score"]


def test_an_engine_that_keeps_earlier_weights_behind_right_checksums_stops_the_run(make):
    loop = make(12, stuck_after=1)
    with pytest.raises(WeightSyncError, match=r"^rollout-0: after the sync of weights version 2, .* by 0\.1000 nats"):
        loop.run()
    assert sorted(loop.tracker.rows) == [1] and loop.store.steps() == []


def test_an_engine_that_stops_taking_weights_in_later_is_found_at_the_tenth_step(make):
    loop = make(12, stuck_after=5)
    with pytest.raises(WeightSyncError, match=r"weights version 10, .* by 0\.5000 nats"):
        loop.run()


def test_a_resumed_run_compares_with_the_baseline_of_the_fresh_one(make):
    make(5, noise=0.01).run()
    again = resumed(make(7, noise=0.04))  # within five times 0.01; twice the bound without a baseline
    assert again.actors.policy[0].target.asked == ["load"]  # nothing was measured
    again.run()
    assert again.progress.sync_baseline == pytest.approx(0.01, abs=1e-6)
    assert measured(again) == {6: {"sync/gap": 0.04}, 7: {}}  # the gap of the sync at the start
    with pytest.raises(WeightSyncError, match=r"weights version 7, .* at most 0\.0500 \(5 times the 0\.0100 before"):
        resumed(make(8, noise=0.06)).run()


def test_the_first_sync_after_a_resume_is_checked(make):
    make(5).run()
    loop = resumed(make(7, stuck_after=4))
    with pytest.raises(WeightSyncError, match=r"weights version 5, .* by 0\.5000 nats"):
        loop.run()


def test_a_checkpoint_without_a_baseline_gets_one_before_the_ranks_take_up_its_weights(make):
    make(5, noise=0.01).run()
    found = make(5).store.latest()
    old = RunState(**vars(found.state))
    del old.extra["sync_baseline"]
    loop = resumed(make(6, noise=0.01), old)
    assert loop.actors.policy[0].target.asked == ["score", "load"]
    loop.run()
    assert measured(loop) == {6: {"sync/baseline": 0.01, "sync/gap": 0.01}}
    assert loop.store.latest().state.extra["sync_baseline"] == pytest.approx(0.01, abs=1e-6)
