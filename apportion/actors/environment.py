"""Hosts environment instances: one actor runs thousands of them, each for one episode.

Synchronous methods run on a pool of threads, asynchronous ones side by side on one event loop, each method as it is
written. A call has a time limit, counted from when it begins to run. What raises or is late ends its own episode with a failure that says why;
the others go on. Python cannot stop a thread: a synchronous call past its limit is left behind in its daemon thread,
and when too many are, further calls fail at once rather than pile up.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from apportion.actors.environment_calls import EventLoop, StepTimeout, ThreadPool
from apportion.data.columns import own_copy
from apportion.data.environments import load_environment
from apportion.platform.known_secrets import redacted_text
from apportion.platform.messages import say
from apportion.platform.process import ActorBase

TRACEBACK_CHARACTERS = 4000


@dataclass
class EnvironmentSpec:
    """What an actor needs to make environments."""

    cls: str  # a built-in name or a dotted path
    params: dict[str, Any] = field(default_factory=dict)
    step_timeout_seconds: float = 10.0
    threads: int = 16  # synchronous calls under way at once


@dataclass
class EpisodeStart:
    """An episode to begin. `columns` are the row's; `seed` is for a row that has none of its own."""

    episode: int  # of the caller's choosing, unique among its live ones
    columns: dict[str, Any]
    seed: int


@dataclass
class Action:
    episode: int
    text: str


@dataclass
class EpisodeState:
    """What an environment answered. With `failure` set there is no observation and the episode is over."""

    episode: int
    observation: str = ""
    reward: float = 0.0  # of this action; 0 after a reset
    done: bool = False
    truncated: bool = False  # done by a limit: the value of what would follow is unknown
    failure: str | None = None  # a traceback, or one line


class EnvironmentWorker(ActorBase):
    """Owns instances by (owner, episode). An owner that begins anew closes whatever it left behind."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._spec = spec
        self._make = load_environment(spec.cls)
        methods = ("reset", "step")
        self._is_async = {name: inspect.iscoroutinefunction(getattr(self._make, name)) for name in methods}
        self._pool = ThreadPool(spec.threads, spec.step_timeout_seconds)
        self._loop = EventLoop(spec.step_timeout_seconds, spec.threads)
        self._live: dict[tuple[str, int], Any] = {}

    def start(self, owner: str, starts: list[EpisodeStart]) -> list[EpisodeState]:
        """Make and reset an instance for each episode; those the owner still has are closed first."""
        self.finish(owner, [episode for name, episode in self._live if name == owner])
        made: dict[int, Any] = {}
        outcomes = self._begin(starts, made)
        self._live |= {(owner, episode): environment for episode, environment in dict(made).items()}
        states = []
        for given, outcome in zip(starts, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                states.append(EpisodeState(given.episode, done=True, failure=_told(outcome, "reset")))
            elif (problem := _no_text(outcome)) is not None:
                states.append(EpisodeState(given.episode, done=True, failure=f"reset: {problem}"))
            else:
                states.append(EpisodeState(given.episode, outcome))
        self._close_ended(owner, states)
        return states

    def step(self, owner: str, actions: list[Action]) -> list[EpisodeState]:
        """Each action's outcome; instances whose episode is over are closed."""
        environments = [self._live[owner, action.episode] for action in actions]
        steps = [_bound(e.step, action.text) for e, action in zip(environments, actions, strict=True)]
        outcomes = self._run("step", steps)
        states = [_state(action.episode, outcome) for action, outcome in zip(actions, outcomes, strict=True)]
        self._close_ended(owner, states)
        return states

    def finish(self, owner: str, episodes: list[int]) -> None:
        """Close instances; closing has the time limit of a step, and what goes wrong is only logged."""
        gone = [self._live.pop((owner, episode)) for episode in episodes if (owner, episode) in self._live]
        closers = [environment.close for environment in gone if callable(getattr(environment, "close", None))]
        waiting = [close for close in closers if inspect.iscoroutinefunction(close)]
        plain = [close for close in closers if not inspect.iscoroutinefunction(close)]
        for outcome in [*(self._pool.run(plain) if plain else []), *(self._loop.run(waiting) if waiting else [])]:
            if isinstance(outcome, BaseException):
                say(_told(outcome, "close"))

    def live(self) -> int:
        """Instances that are open."""
        return len(self._live)

    def _run(self, method: str, functions: list[Callable[[], Any]]) -> list[Any]:
        if self._is_async[method]:
            return self._loop.run(functions)
        outcomes = self._pool.run(functions)
        waiting = [at for at, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]  # it hid what it is
        if waiting:
            for at, outcome in zip(
                waiting, self._loop.run([partial(_given, outcomes[at]) for at in waiting]), strict=True
            ):
                outcomes[at] = outcome
        return outcomes

    def _begin(self, starts: list[EpisodeStart], made: dict[int, Any]) -> list[Any]:
        """Make instances, kept in `made` however their reset ends, and reset them. What an asynchronous one opens belongs
        to the loop, so it is made there; a reset that is not asynchronous may block, so it runs on a thread."""

        def make(start: EpisodeStart) -> None:
            made[start.episode] = self._make(**self._spec.params)

        async def make_on_loop(start: EpisodeStart) -> None:
            make(start)

        def reset(start: EpisodeStart) -> Any:
            environment = made[start.episode]
            return environment.reset(**reset_arguments(environment.reset, start))

        def begin(start: EpisodeStart) -> Any:
            make(start)
            return reset(start)

        if self._is_async["reset"] or not self._is_async["step"]:
            return self._run("reset", [partial(begin, start) for start in starts])
        outcomes = self._loop.run([partial(make_on_loop, start) for start in starts])
        there = [at for at, outcome in enumerate(outcomes) if not isinstance(outcome, BaseException)]
        for at, outcome in zip(there, self._run("reset", [partial(reset, starts[at]) for at in there]), strict=True):
            outcomes[at] = outcome
        return outcomes

    def _close_ended(self, owner: str, states: list[EpisodeState]) -> None:
        self.finish(owner, [state.episode for state in states if state.done])


def reset_arguments(reset: Callable[..., Any], start: EpisodeStart) -> dict[str, Any]:
    """The columns that `reset` names, all of them where it takes **kwargs; `seed` where no column has that name.

    >>> reset_arguments(lambda food, seed: "", EpisodeStart(0, {"food": "pie", "id": 7}, seed=3))
    {'seed': 3, 'food': 'pie'}
    """
    given = {"seed": start.seed} | own_copy(start.columns)  # responses to one prompt share a row
    parameters = inspect.signature(reset).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return given
    names = {p.name for p in parameters}
    return {name: value for name, value in given.items() if name in names}


async def _given(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _bound(step: Callable[[str], Any], text: str) -> Callable[[], Any]:
    return lambda: step(text)


def _state(episode: int, outcome: Any) -> EpisodeState:
    """An environment's answer, checked."""
    if isinstance(outcome, BaseException):
        return EpisodeState(episode, done=True, failure=_told(outcome, "step"))
    try:
        observation, reward, done, info = outcome
        number, over = float(reward), bool(done)
        truncated = over and bool((info or {}).get("truncated", False))
    except Exception as error:  # noqa: BLE001 - a user's values: an array as `done`, an info without keys, a number too large
        text = f"step: got {_shown(outcome)} ({type(error).__name__}), expected (observation, reward, done, info)"
        return EpisodeState(episode, done=True, failure=text)
    if not math.isfinite(number):
        return EpisodeState(episode, done=True, failure=f"step: got reward {number}, expected a finite number")
    problem = _no_text(observation)
    if problem is not None:
        return EpisodeState(episode, done=True, failure=f"step: {problem}")
    return EpisodeState(episode, observation, number, over, truncated)


def _shown(outcome: Any) -> str:
    try:
        return repr(str(outcome)[:80])
    except Exception:  # noqa: BLE001 - a user's own __str__, or a number of too many digits
        return f"a {type(outcome).__name__}"


def _no_text(observation: Any) -> str | None:
    """Why this is no observation that a tokenizer takes, or None where it is."""
    if not isinstance(observation, str):
        return f"got an observation of type {type(observation).__name__}, expected text"
    try:
        observation.encode()
    except UnicodeEncodeError as error:
        return f"got an observation that is no text ({error}), expected whole characters"
    return None


def _told(error: BaseException, method: str) -> str:
    if isinstance(error, StepTimeout):
        return f"{method}: {error}"
    # Mask secrets before shortening: half a secret is not recognized.
    text = redacted_text("".join(traceback.format_exception(error)))
    return f"{method}:\n{text[-TRACEBACK_CHARACTERS:]}"
