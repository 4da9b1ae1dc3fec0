"""Single-turn rollout on an engine that says what a test scripts: how each response ended, versions and seeds."""

from types import SimpleNamespace

import numpy as np
import pytest

from apportion.actors import rollout
from apportion.actors.engines import Sample, Sampling, seed_of
from apportion.batch import Prompt
from apportion.platform.weights import SyncReceipt, WeightBundle


class ScriptedEngine:
    """One token more for each request, ended in turn by `stop`, `length` and `abort`."""

    def __init__(self):
        self.asked = []

    def generate(self, requests, sampling):
        self.asked.append(requests)
        reasons = ["stop", "length", "abort"]
        return [
            Sample(np.arange(20, 21 + i, dtype=np.int32), np.full(1 + i, -0.5, np.float32), reasons[i % 3], f"said {i}")
            for i in range(len(requests))
        ]

    def score(self, token_ids):
        return -0.5 * token_ids[1:].astype(np.float32)

    def load(self, bundle, name, check):
        return SyncReceipt(name, bundle.version, {}, 0, [], None)

    def receive(self, entries, version, name, check):
        return SyncReceipt(name, version, {}, 0, [], None)


PROMPTS = [Prompt("a", np.array([5, 6], np.int32), "?"), Prompt("b", np.array([7], np.int32), "?")]


@pytest.fixture
def worker_with(monkeypatch):
    def made(seed_each_sample=True):
        engine = ScriptedEngine()
        monkeypatch.setattr(rollout, "make_engine", lambda name, spec: engine)
        spec = rollout.RolloutSpec("scripted", SimpleNamespace(model="", trust_remote_code=False), 4, seed_each_sample)
        return rollout.RolloutWorker(spec, "rollout-0"), engine

    return made


def seeds(engine):
    return [request.seed for request in engine.asked[-1]]


def test_only_a_response_that_stopped_by_itself_has_terminated(worker_with):
    worker, _ = worker_with()
    report, batch = worker.generate(PROMPTS[:1], 3, 3, Sampling())
    assert batch.finish_reasons == ["stop", "length", "abort"]
    assert batch.terminated.tolist() == [True, False, False]
    assert batch.group_ids.tolist() == [3, 3, 3] and batch.sample_indices.tolist() == [0, 1, 2]
    assert [batch.sequence(i).tolist() for i in range(3)] == [[5, 6, 20], [5, 6, 20, 21], [5, 6, 20, 21, 22]]
    assert batch.action_mask.all() and not batch.turn_ids.any()
    assert batch.texts == ["said 0", "said 1", "said 2"]
    assert (report.sampled_tokens, report.trajectories) == (6, 3)


@pytest.mark.parametrize("way", ["load_weights", "receive_weights", "set_version"])
def test_new_weights_give_responses_their_version_and_seeds_of_their_own(worker_with, way):
    worker, engine = worker_with()
    _, before = worker.generate(PROMPTS, 0, 2, Sampling())
    first = seeds(engine)
    assert set(before.policy_versions.tolist()) == {0} and len(set(first)) == 4
    arguments = {
        "load_weights": (WeightBundle(3, [], np.zeros(0, np.uint8)), True),
        "receive_weights": ([], 3, True),
        "set_version": (3,),
    }
    receipt = getattr(worker, way)(*arguments[way])
    assert receipt is None if way == "set_version" else receipt.version == 3
    _, after = worker.generate(PROMPTS, 0, 2, Sampling())
    assert set(after.policy_versions.tolist()) == {3}
    assert set(first).isdisjoint(seeds(engine))
    worker.generate(PROMPTS, 8, 2, Sampling())
    assert seeds(engine) == [seed_of(f"4/{p}/{i}/3".encode()) for p in "ab" for i in range(2)]


def test_a_score_is_the_engines_and_moves_neither_version_nor_seeds(worker_with):
    worker, engine = worker_with()
    worker.set_version(3)
    assert worker.score(np.array([4, 2, 6], np.int32)).tolist() == [-1.0, -3.0]
    worker.generate(PROMPTS, 8, 2, Sampling())
    assert seeds(engine) == [seed_of(f"4/{p}/{i}/3".encode()) for p in "ab" for i in range(2)]


def test_without_seeds_of_their_own_requests_have_none(worker_with):
    worker, engine = worker_with(seed_each_sample=False)
    worker.generate(PROMPTS, 0, 2, Sampling())
    assert seeds(engine) == [None] * 4
