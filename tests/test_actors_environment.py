"""The environment actor: many instances, sync and async, limits that hold, failures that end their own episode alone."""

import asyncio
import contextlib
import sys
import threading
import time

import numpy as np
import pytest

from apportion.actors.environment import Action, EnvironmentSpec, EnvironmentWorker, EpisodeStart, EpisodeState
from apportion.actors.environment_calls import ThreadPool
from apportion.actors.environment_client import SLACK_SECONDS, RemoteEnvironments, share, sharing
from apportion.platform.cluster import Cluster

OPEN = []  # instances of this process that were not closed
ODD = {
    "info in words": ("x", 1.0, True, "won"),
    "huge": ("x", 10**400, False, {}),
    "endless": ("x", 10**5000, False, {}),
    "many dones": ("x", 1.0, np.array([True, False]), {}),
    "half a character": ("\ud83d", 1.0, False, {}),
    "number": (3, 1.0, False, {}),
}
EXPECTED = "expected (observation, reward, done, info)"


class Counter:
    """Counts to `to`; some words make it go wrong."""

    def __init__(self, to=3):
        self.to = to
        OPEN.append(self)

    def reset(self, start=0, seed=None):
        if start == "broken":
            raise ValueError("cannot start")
        self.count, self.seed = start, seed
        return f"at {start}"

    def step(self, action):
        if action == "raise":
            raise RuntimeError("a wire came loose")
        if action == "sleep":
            time.sleep(30)
        if action == "nothing":
            return None
        if action == "infinity":
            return "x", float("inf"), False, {}
        if action in ODD:
            return ODD[action]
        self.count += 1
        return f"at {self.count}", 0.5, self.count == self.to, {"truncated": action == "give up"}

    def close(self):
        OPEN.remove(self)


class AsyncCounter(Counter):
    async def reset(self, start=0):
        await asyncio.sleep(0)
        return Counter.reset(self, start)

    async def step(self, action):
        await asyncio.sleep(30 if action == "sleep" else 0.05)
        return Counter.step(self, action)

    async def close(self):
        OPEN.remove(self)


class Blocking(AsyncCounter):
    async def step(self, action):
        time.sleep(3)


class Mixed(Counter):
    """One method of each kind; keeps the threads on which they ran."""

    def reset(self, start=0):
        self.threads = [threading.current_thread().name]
        time.sleep(1.5 if start == "slow" else 0)
        return Counter.reset(self, start)

    async def step(self, action):
        self.threads.append(threading.current_thread().name)
        return Counter.step(self, action)


class MixedToo(Counter):
    async def reset(self, start=0):
        self.threads = [threading.current_thread().name]
        return Counter.reset(self, start)

    def step(self, action):
        self.threads.append(threading.current_thread().name)
        return Counter.step(self, action)

    async def close(self):
        self.threads.append(threading.current_thread().name)
        OPEN.remove(self)


class Busy(AsyncCounter):
    async def step(self, action):
        if action == "block":
            time.sleep(5)
        if action == "exit":
            sys.exit(3)
        if action == "stubborn":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            await asyncio.sleep(30)
        if action == "wait":
            await asyncio.sleep(0.05)
        time.sleep(0.01)
        return Counter.step(self, action)


class Everything:
    def reset(self, **row):
        return ",".join(f"{name}={row[name]}" for name in sorted(row))

    def step(self, action):
        return "", 0, True, None


class CannotClose(Counter):
    def close(self):
        OPEN.remove(self)
        raise OSError("already gone")


@pytest.fixture(autouse=True)
def nothing_open():
    OPEN.clear()


def worker(cls=Counter, seconds=5.0, threads=8, **params):
    return EnvironmentWorker(EnvironmentSpec(f"{__name__}:{cls.__name__}", params, seconds, threads))


def starts(count, **columns):
    return [EpisodeStart(number, columns, seed=number) for number in range(count)]


@pytest.mark.parametrize("cls", [Counter, AsyncCounter])
def test_an_episode_is_reset_stepped_and_closed(cls):
    host = worker(cls, to=2)
    [state] = host.start("me", starts(1))
    assert (state.episode, state.observation, state.reward, state.done) == (0, "at 0", 0.0, False)
    [state] = host.step("me", [Action(0, "up")])
    assert (state.observation, state.reward, state.done) == ("at 1", 0.5, False)
    assert len(OPEN) == host.live() == 1
    [state] = host.step("me", [Action(0, "up")])
    assert (state.observation, state.done, state.truncated) == ("at 2", True, False)
    assert len(OPEN) == host.live() == 0


def test_an_end_by_a_limit_is_told_apart():
    host = worker(to=1)
    host.start("me", starts(1))
    [state] = host.step("me", [Action(0, "give up")])
    assert (state.done, state.truncated) == (True, True)


def test_reset_is_given_the_columns_that_it_names_and_a_seed_unless_the_row_has_one():
    host = worker()
    assert host.start("me", [EpisodeStart(4, {"start": 7, "answer": "x"}, seed=5)])[0].observation == "at 7"
    assert OPEN[0].seed == 5
    every = worker(Everything)
    assert every.start("me", [EpisodeStart(0, {"b": 1, "a": 2}, seed=5)])[0].observation == "a=2,b=1,seed=5"
    assert every.start("me", [EpisodeStart(0, {"seed": 9}, seed=5)])[0].observation == "seed=9"


@pytest.mark.parametrize("cls", [Counter, AsyncCounter])
def test_what_raises_ends_its_own_episode_and_the_others_go_on(cls):
    host = worker(cls)
    broken = [EpisodeStart(0, {}, 0), EpisodeStart(1, {"start": "broken"}, 0), EpisodeStart(2, {}, 0)]
    states = host.start("me", broken)
    assert [state.done for state in states] == [False, True, False]
    assert states[1].failure.startswith("reset:\n") and "ValueError: cannot start" in states[1].failure
    assert len(OPEN) == 2
    states = host.step("me", [Action(0, "raise"), Action(2, "up")])
    assert "RuntimeError: a wire came loose" in states[0].failure
    assert (states[1].observation, states[1].failure) == ("at 1", None)
    assert len(OPEN) == 1


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("nothing", f"step: got 'None' (TypeError), {EXPECTED}"),
        ("infinity", "step: got reward inf, expected a finite number"),
        ("info in words", f"step: got \"('x', 1.0, True, 'won')\" (AttributeError), {EXPECTED}"),
        ("huge", f"step: got \"('x', 1{'0' * 73}\" (OverflowError), {EXPECTED}"),
        ("endless", f"step: got a tuple (OverflowError), {EXPECTED}"),
        ("many dones", f"step: got \"('x', 1.0, array([ True, False]), {{}})\" (ValueError), {EXPECTED}"),
        ("number", "step: got an observation of type int, expected text"),
    ],
)
def test_an_answer_that_is_none_is_a_failure(action, told):
    host = worker()
    host.start("me", starts(1))
    assert host.step("me", [Action(0, action)])[0].failure == told


def test_an_observation_that_is_half_a_character_ends_its_own_episode_alone():
    host = worker()
    host.start("me", starts(2))
    states = host.step("me", [Action(0, "half a character"), Action(1, "up")])
    assert states[0].failure.startswith("step: got an observation that is no text ('utf-8' codec can't encode")
    assert (states[0].done, states[1].observation, states[1].failure) == (True, "at 1", None)


@pytest.mark.parametrize("cls", [Counter, AsyncCounter])
def test_a_step_past_its_limit_fails_while_the_others_answer(cls):
    host = worker(cls, seconds=0.4)
    host.start("me", starts(3))
    begun = time.monotonic()
    states = host.step("me", [Action(0, "up"), Action(1, "sleep"), Action(2, "up")])
    assert time.monotonic() - begun < 15  # it sleeps 30 s
    assert [state.failure is None for state in states] == [True, False, True]
    assert states[1].failure.startswith("step: no answer within 0.4 s")
    assert [state.observation for state in host.step("me", [Action(0, "up"), Action(2, "up")])] == ["at 2", "at 2"]


def test_a_coroutine_that_blocks_the_loop_costs_its_round_and_not_the_next():
    host = worker(Blocking, seconds=0.3)
    host.start("me", starts(1))
    [state] = host.step("me", [Action(0, "up")])
    assert "blocks the event loop" in state.failure
    [state] = host.start("me", starts(1))
    assert state.observation == "at 0"


@pytest.mark.slow
def test_coroutines_that_keep_the_loop_busy_together_longer_than_the_limit_of_one_all_answer():
    host = worker(Busy, seconds=1.0, to=9)
    host.start("me", starts(250))
    states = host.step("me", [Action(number, "up") for number in range(250)])  # 2.5 s, past the limit and its grace
    assert {(state.observation, state.failure) for state in states} == {("at 1", None)}


@pytest.mark.slow
def test_who_blocks_the_loop_is_found_and_what_has_not_begun_goes_on_without_it():
    host = worker(Busy, seconds=1.0)
    host.start("me", starts(5))
    words = ["up", "wait", "block", "up", "wait"]
    states = host.step("me", [Action(number, word) for number, word in enumerate(words)])
    late = "step: no answer within 1 s; "
    assert [state.failure for state in states] == [
        None, f"{late}another asynchronous environment blocks the event loop", f"{late}it blocks the event loop", None, None
    ]  # fmt: skip
    assert [state.observation for state in states] == ["at 1", "", "", "at 1", "at 1"]
    assert [state.observation for state in host.step("me", [Action(0, "up"), Action(3, "wait")])] == ["at 2", "at 2"]


@pytest.mark.slow
def test_a_round_gives_up_two_blocked_loops_and_calls_nothing_more():
    host = worker(Busy, seconds=0.3)
    host.start("me", starts(4))
    states = host.step("me", [Action(number, "block") for number in range(4)])
    blocked = "step: no answer within 0.3 s; it blocks the event loop"
    assert [state.failure for state in states] == [blocked] * 2 + [
        "step: not called: asynchronous environments blocked the event loop, or kept it busy, for too long"
    ] * 2


@pytest.mark.slow
def test_a_coroutine_that_ignores_its_end_is_given_up_alone():
    host = worker(Busy, seconds=0.3)
    host.start("me", starts(2))
    states = host.step("me", [Action(0, "stubborn"), Action(1, "wait")])
    assert [state.failure for state in states] == ["step: no answer within 0.3 s", None]
    assert host.step("me", [Action(1, "wait")])[0].observation == "at 2"


def test_a_coroutine_that_exits_ends_its_own_episode_and_the_loop_goes_on():
    host = worker(Busy, seconds=5.0)
    host.start("me", starts(3))
    begun = time.monotonic()
    states = host.step("me", [Action(0, "wait"), Action(1, "exit"), Action(2, "up")])
    assert [state.failure is None for state in states] == [True, False, True]
    assert states[1].failure.endswith("SystemExit: 3\n")
    assert [state.observation for state in host.step("me", [Action(0, "up"), Action(2, "wait")])] == ["at 2", "at 2"]
    assert time.monotonic() - begun < 4  # nobody waited for a loop that ended


@pytest.mark.parametrize(
    ("cls", "threads"),
    [
        (Mixed, ["environment", "environment-loop"]),
        (MixedToo, ["environment-loop", "environment", "environment-loop"]),
    ],
)
def test_each_method_runs_where_its_kind_does(cls, threads):
    host = worker(cls, to=1)
    assert host.start("me", starts(1))[0].observation == "at 0"
    [instance] = OPEN
    [state] = host.step("me", [Action(0, "up")])
    assert (state.observation, state.done, state.failure) == ("at 1", True, None)
    assert (instance.threads, OPEN) == (threads, [])


@pytest.mark.slow
def test_slow_resets_beside_asynchronous_steps_wait_side_by_side():
    host = worker(Mixed, seconds=10.0)
    begun = time.monotonic()
    states = host.start("me", [EpisodeStart(number, {"start": "slow"}, 0) for number in range(8)])
    assert time.monotonic() - begun < 6  # 12 s one after the other
    assert {state.observation for state in states} == {"at slow"}


def test_an_instance_whose_reset_failed_is_closed_as_its_own_close_is_written():
    host = worker(MixedToo)
    [state] = host.start("me", [EpisodeStart(0, {"start": "broken"}, 0)])
    assert "ValueError: cannot start" in state.failure
    assert (OPEN, host.live()) == ([], 0)


def test_thousands_step_at_once():
    host = worker(AsyncCounter, to=9)
    host.start("me", starts(2000))
    begun = time.monotonic()
    states = host.step("me", [Action(number, "up") for number in range(2000)])
    assert {state.observation for state in states} == {"at 1"}
    assert time.monotonic() - begun < 5  # one after the other they would sleep 100 s
    plain = worker(to=9)
    plain.start("me", starts(2000))
    assert sum(state.reward for state in plain.step("me", [Action(n, "up") for n in range(2000)])) == 1000.0


def test_what_an_owner_left_behind_is_closed_when_it_begins_anew_and_another_owner_s_is_not():
    host = worker()
    host.start("one", starts(3))
    host.start("two", starts(2))
    host.start("one", starts(1))
    assert len(OPEN) == host.live() == 3
    host.finish("two", [0, 1, 17])
    assert len(OPEN) == host.live() == 1


def test_closing_that_raises_is_logged_and_harms_nobody(capsys):
    host = worker(CannotClose)
    host.start("me", starts(1))
    host.finish("me", [0])
    assert host.live() == 0
    assert "OSError: already gone" in capsys.readouterr().out


def test_calls_wait_for_a_free_thread_without_being_late():
    pool = ThreadPool(threads=2, limit=0.5)
    results = pool.run([lambda: time.sleep(0.2) or threading.get_ident()] * 8)  # 0.8 s in all
    assert len(set(results)) == 2


def test_past_the_bound_of_busy_threads_nothing_more_is_called():
    pool, release = ThreadPool(threads=1, limit=0.1, max_hung=2), threading.Event()
    results = pool.run([release.wait] * 4)
    assert [str(result).split(",")[0].split(":")[0] for result in results] == ["no answer within 0.1 s"] * 2 + [
        "not called"
    ] * 2
    assert pool.hung == 2
    release.set()
    deadline = time.monotonic() + 5
    while pool.hung and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.run([lambda: 3]) == [3]


def test_engines_share_environment_actors_evenly():
    assert [share("abcd", engine, 2) for engine in range(2)] == [["a", "c"], ["b", "d"]]
    assert [share("ab", engine, 3) for engine in range(3)] == [["a"], ["b"], ["a"]]


class Answering:
    """An environment actor of which only the calls are seen."""

    def call(self, method, owner, part):
        return [EpisodeState(getattr(item, "episode", item)) for item in part]


def test_a_call_is_given_the_time_of_those_that_the_actor_answers_before(monkeypatch):
    waited = []

    def gathered(calls, seconds, what):
        waited.append(seconds - SLACK_SECONDS)
        return calls

    monkeypatch.setattr("apportion.actors.environment_client.gather", gathered)
    alone = RemoteEnvironments([Answering()], "rollout-0", 10.0, 16)
    alone.start(starts(64))  # four rounds of 16 threads, each the limit twice and closing as long
    alone.step([Action(0, "up")])
    shared = RemoteEnvironments([Answering()], "rollout-0", 10.0, 16, sharing=8)
    shared.start(starts(64))
    shared.step([Action(0, "up")])  # seven others may step 64 each
    shared.finish([0])
    assert waited == [160.0, 40.0, 1280.0, 40.0 + 7 * 160.0, 40.0 + 7 * 160.0]


def test_as_many_engines_share_an_actor_as_are_led_to_it():
    for environments in range(1, 6):
        for engines in range(1, 10):
            led = [actor for engine in range(engines) for actor in share(range(environments), engine, engines)]
            assert max(led.count(actor) for actor in led) == sharing(environments, engines)


@pytest.mark.system
def test_instances_are_dealt_over_real_actors_and_answers_come_in_order(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from apportion.platform.cluster import ActorRequest

    cluster = Cluster(None, "environments", 1, tmp_path, None)
    try:
        spec = EnvironmentSpec("microwave", {"steps": 2})
        actors = cluster.start([ActorRequest(f"environment-{i}", EnvironmentWorker, (spec,)) for i in range(2)], 120)
        remote = RemoteEnvironments(actors, "rollout-0", 5.0, 16)
        states = remote.start([EpisodeStart(n, {"food": food}, 0) for n, food in enumerate(["pie", "tea", "rice"])])
        assert [state.observation.split(". ")[1].split()[1] for state in states] == ["pie", "tea", "rice"]
        actions = [Action(2, "open the microwave"), Action(0, "dance"), Action(1, "open the microwave")]
        assert [state.observation for state in remote.step(actions)] == [
            "The microwave is open. The rice is on the table.",
            "Nothing happens. The microwave is closed. The pie is on the table.",
            "The microwave is open. The tea is on the table.",
        ]
        remote.finish([1])
        assert [state.reward for state in remote.step([Action(0, "dance"), Action(2, "put it in the microwave")])] == [
            -1,
            -1,
        ]
    finally:
        cluster.shutdown()
