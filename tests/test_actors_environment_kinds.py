"""Environments some of whose methods are asynchronous: what they open belongs to the loop, whatever they look like."""

import asyncio
import functools

import pytest

from apportion.actors.environment import Action, EnvironmentSpec, EnvironmentWorker, EpisodeStart


class WithSession:
    """Its constructor needs the loop on which its steps run; its reset is a plain method."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()

    def reset(self):
        return "ready"

    async def step(self, action):
        return "same" if asyncio.get_running_loop() is self.loop else "another", 1.0, True, {}


def undisclosed(method):
    """As decorators are that return what an asynchronous function gave them."""

    @functools.wraps(method, assigned=("__name__", "__doc__"), updated=())
    def call(*given, **named):
        return method(*given, **named)

    del call.__wrapped__
    return call


class Decorated:
    @undisclosed
    async def reset(self, **row):
        await asyncio.sleep(0)
        return "ready"

    @undisclosed
    async def step(self, action):
        await asyncio.sleep(0)
        return action.upper(), 0.5, True, {}


@pytest.mark.parametrize(("cls", "answer", "reward"), [(WithSession, "same", 1.0), (Decorated, "GO", 0.5)])
def test_what_is_asynchronous_has_its_loop(cls, answer, reward):
    worker = EnvironmentWorker(EnvironmentSpec(f"{__name__}:{cls.__name__}", {}, 5.0, 4))
    started = worker.start("engine", [EpisodeStart(number, {}, 0) for number in range(3)])
    assert [(state.observation, state.failure) for state in started] == [("ready", None)] * 3
    stepped = worker.step("engine", [Action(number, "go") for number in range(3)])
    assert [(s.observation, s.reward, s.done, s.failure) for s in stepped] == [(answer, reward, True, None)] * 3


@pytest.mark.slow
def test_a_loop_that_is_kept_busy_ends_within_what_the_caller_waits():
    """Each call is within its limit; all of them one after the other would take five times as long as they may."""
    from apportion.actors.environment_calls import EventLoop

    async def busy():
        import time

        time.sleep(0.08)
        return 1

    outcomes = EventLoop(0.1, threads=40).run([busy] * 80)
    answered = [outcome for outcome in outcomes if outcome == 1]
    assert 1 <= len(answered) < 80
    assert all(outcome == 1 or "event loop" in str(outcome) for outcome in outcomes)
