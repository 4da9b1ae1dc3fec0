"""A call is late only when its actor has made no progress for the limit: with a fake clock, and on a real Ray."""

import os
import time

import pytest

from apportion.platform import progress
from apportion.platform.cluster import Actor, ActorRequest, Call, Cluster, _late, gather
from apportion.platform.errors import ActorError
from apportion.platform.process import ActorBase
from apportion.platform.progress import Clocks, Count, Counter


class Fake:
    """Time and counts, by hand."""

    def __init__(self, seconds, keys=("a",), answers=True):
        self.time, self.counts, self.looks = 0.0, {}, []
        aside = (lambda work: work()) if answers else (lambda work: None)
        self.clocks = Clocks(keys, seconds, self.read, lambda: self.time, aside)

    def read(self, keys):
        self.looks.append(self.time)
        return {key: self.counts[key] for key in keys if key in self.counts}

    def run(self, until, *keys):
        """As `gather` does, each second. The seconds left of each key at the end."""
        while self.time < until:
            self.time += 1.0
            self.clocks.look(keys)
        self.clocks.look(keys)
        return [self.clocks.left(key) for key in keys]


def test_a_call_without_a_count_has_the_plain_limit():
    fake = Fake(100, ["a", ""])
    assert fake.run(99, "a", "") == [1.0, 1.0]
    assert fake.looks == [20.0, 40.0, 60.0, 80.0]  # of whoever may count, every 20 s
    assert fake.run(100, "a", "") == [0.0, 0.0]
    assert fake.looks[-1] == 100.0  # once more, to be sure


def test_progress_moves_the_deadline_and_standstill_does_not():
    fake = Fake(100)
    for second in range(1, 251):  # alive for 250 s, longer than the limit
        fake.counts["a"] = f"1 {second} engine steps"
        [left] = fake.run(second, "a")
        assert left > 79
    assert fake.run(340, "a") == [20.0]  # the last progress was seen at 260 s
    assert fake.run(359, "a") == [1.0]
    assert fake.run(360, "a") == [0.0]
    assert fake.clocks.count("a") == Count(1, 250, "engine steps")


def test_progress_between_the_last_look_and_the_deadline_is_seen():
    fake = Fake(100)
    fake.counts["a"] = "1 5 passes"
    fake.run(99, "a")
    assert fake.clocks.left("a") == 21.0  # it was seen at 20 s
    fake.looks.clear()
    fake.run(119, "a")
    fake.counts["a"] = "1 6 passes"
    assert fake.run(121, "a") == [99.0]
    assert fake.looks == [100.0, 120.0]


def test_another_call_of_the_same_actor_is_progress():
    fake = Fake(100)
    fake.counts["a"] = "1 5 passes"
    fake.run(50, "a")
    fake.counts["a"] = "2 5 passes"
    assert fake.run(81, "a") == [79.0]


def test_only_who_stands_still_is_late():
    fake = Fake(100, ["a", "b"])
    for second in range(1, 122):
        fake.counts = {"a": f"1 {second} passes", "b": "1 1 passes"}
        a, b = fake.run(second, "a", "b")
    assert (b, a > 79) == (0.0, True)


def test_a_look_that_gets_no_answer_holds_nobody_up():
    """Ray may hang: the call is late a few seconds after its limit."""
    fake = Fake(100, answers=False)
    assert fake.run(105, "a") == [0.1]
    assert fake.run(111, "a") == [0.0]
    assert fake.looks == []


def test_a_look_that_fails_is_one_without_an_answer():
    """Ray may be lost, or end, while a thread asks it: nothing is raised in that thread, and the next look counts again."""
    fake = Fake(100)
    fake.counts["a"] = "1 5 passes"
    fake.run(20, "a")
    good = fake.clocks._read

    def lost(keys):
        raise RuntimeError("no GCS")

    fake.clocks._read = lost
    assert fake.run(60, "a") == [60.0]
    fake.clocks._read = good
    fake.counts["a"] = "1 6 passes"
    fake.run(81, "a")
    assert (fake.clocks.count("a"), fake.clocks.left("a")) == (Count(1, 6, "passes"), 99.0)


def test_an_actor_counts_on_after_a_failure_to_tell(capsys):
    told, outages = [], [RuntimeError("no GCS"), RuntimeError("no GCS")]

    def send(text):
        if outages:
            raise outages.pop()
        told.append(text)

    counter = Counter(send, every=0.01)
    counter.begin("passes")
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    counter._every = 3600.0  # its thread lives on
    assert told == ["1 0 passes"]
    assert capsys.readouterr().out == "progress is not told: RuntimeError: no GCS\n"


def test_an_actor_leaves_its_count_when_it_has_changed():
    told = []
    counter = Counter(told.append, every=3600.0)
    counter.tell()
    counter.begin("passes")
    counter.advance()
    counter.advance()
    counter.tell()
    counter.tell()
    counter.begin("engine steps")
    counter.tell()
    assert told == ["1 2 passes", "2 0 engine steps"]
    assert Count.of(told[1]) == Count(2, 0, "engine steps")


def test_without_a_key_nothing_is_counted(monkeypatch):
    monkeypatch.setattr(progress, "_counter", None)
    monkeypatch.delenv(progress.KEY, raising=False)
    progress.begin("passes")
    progress.advance()
    assert progress._counter is None


def test_the_message_says_what_was_done_before():
    actors = [Actor("rollout-0", None, "", progress="a"), Actor("policy-1", None, "", progress="b")]
    calls = [Call(actors[0], "generate", []), Call(actors[1], "save", [])]
    fake = Fake(1800, ["a", "b"])
    fake.counts["a"] = "3 4812 engine steps"
    fake.run(30, "a", "b")
    text = _late(calls, fake.clocks, 1800, "rollout of step 4")
    assert text.startswith(
        "rollout of step 4: no progress for 1800 s from rollout-0 (generate; 4,812 engine steps before), policy-1 (save); "
        "raise cluster.call_timeout_seconds if it is only slow"
    )
    assert _late(calls[1:], fake.clocks, 1800, "x").startswith("x: no answer within 1800 s from policy-1 (save); raise")


class Counting(ActorBase):
    """Makes progress for `busy` seconds, then none."""

    def work(self, busy: float, idle: float) -> str:
        progress.TELL_SECONDS = 0.2
        progress._counter = progress.Counter(lambda text: progress._put(os.environ[progress.KEY], text), 0.2)
        progress.begin("passes")
        for _ in range(round(busy / 0.1)):
            time.sleep(0.1)
            progress.advance()
        time.sleep(idle)
        return "done"


@pytest.mark.system
def test_an_actor_that_makes_progress_outlives_the_limit_and_one_that_stops_is_named(tmp_path):
    cluster = Cluster(None, "progress", 1, tmp_path, 0.1)
    try:
        good, bad = cluster.start([ActorRequest(f"counting-{i}", Counting) for i in range(2)], 60)
        assert gather([good.call("work", 5.0, 0.0)], 2.0, "a test") == ["done"]
        start = time.monotonic()
        with pytest.raises(
            ActorError,
            match=r"^a test: no progress for 2 s from counting-1 \(pid \d+ on .*\) \(work; 10 passes before\); raise ",
        ):
            gather([good.call("work", 8.0, 0.0), bad.call("work", 1.0, 60.0)], 2.0, "a test")
        assert 2.5 < time.monotonic() - start < 6.0
        mark = good.progress.partition("/")[0]
        assert sorted(progress._get([good.progress, bad.progress])) == [f"{mark}/counting-0", f"{mark}/counting-1"]
        progress.forget(mark)
        assert progress._get([bad.progress]) == {}
    finally:
        cluster.shutdown()


@pytest.fixture
def counted(monkeypatch):
    """The counter of this process, as in an actor, without its thread."""
    counter = Counter(lambda text: None, every=3600.0)
    monkeypatch.setattr(progress, "_counter", counter)
    return counter


def test_each_step_of_vllm_counts(counted):
    from apportion.actors.engines.vllm_engine import count_steps

    class Engine:
        def step(self):
            return ["output"]

    engine = Engine()
    count_steps(engine)
    progress.begin("engine steps")
    assert [engine.step() for _ in range(3)] == [["output"]] * 3
    assert counted._count == Count(1, 3, "engine steps")


def test_each_token_of_the_transformers_engine_counts_and_changes_nothing(counted):
    import numpy as np

    from apportion.actors.engines import EngineSpec, Request, Sampling
    from apportion.actors.engines.transformers_engine import TransformersEngine
    from apportion.data.builtin import resolve_model

    spec = EngineSpec(
        model=resolve_model("builtin:tiny"), dtype="float32", seed=0, max_model_len=64, max_sequences=2,
        tensor_parallel_size=1, gpu_memory_utilization=0.9, kv_cache_gib=1.0, compile=False, prefix_caching=False,
        trust_remote_code=False, threads=1, first_thread=0, seeded=False,
    )  # fmt: skip
    engine = TransformersEngine(spec)
    requests = [Request(np.array([5, 6, 7 + i], np.int32), None) for i in range(3)]  # in two batches
    progress.begin("engine steps")
    samples = engine.generate(requests, Sampling(0.0, max_tokens=4))
    lengths = [len(sample.token_ids) for sample in samples]
    assert counted._count == Count(1, max(lengths[:2]) + lengths[2], "engine steps")
