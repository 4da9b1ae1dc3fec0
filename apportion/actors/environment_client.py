"""How a rollout worker reaches its environments: instances dealt over environment actors, one wait for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, TypeVar

from apportion.actors.environment import Action, EpisodeStart, EpisodeState
from apportion.platform.cluster import Actor, Call, gather

SLACK_SECONDS = 60.0  # for the actor's own work, and for what others ask of it meanwhile

T = TypeVar("T")


class RemoteEnvironments:
    """Instances of one owner on `actors`; an episode stays on the actor that its number gives."""

    def __init__(self, actors: Sequence[Actor], owner: str, step_timeout_seconds: float, threads: int) -> None:
        self._actors, self._owner = list(actors), owner
        self._timeout, self._threads = step_timeout_seconds, threads

    def start(self, starts: list[EpisodeStart]) -> list[EpisodeState]:
        return self._ask("start", starts, lambda start: start.episode)

    def step(self, actions: list[Action]) -> list[EpisodeState]:
        return self._ask("step", actions, lambda action: action.episode)

    def finish(self, episodes: list[int]) -> None:
        if episodes:
            self._gather("finish", self._dealt(episodes, lambda episode: episode))

    def _ask(self, method: str, items: list[T], number: Callable[[T], int]) -> list[EpisodeState]:
        """The state that each item leads to, in the order of the items."""
        states = {state.episode: state for part in self._gather(method, self._dealt(items, number)) for state in part}
        return [states[number(item)] for item in items]

    def _dealt(self, items: list[T], number: Callable[[T], int]) -> dict[int, list[T]]:
        parts: dict[int, list[T]] = {}
        for item in items:
            parts.setdefault(number(item) % len(self._actors), []).append(item)
        return parts

    def _gather(self, method: str, parts: dict[int, list[Any]]) -> list[Any]:
        calls: list[Call] = [self._actors[at].call(method, self._owner, part) for at, part in parts.items()]
        most = max(map(len, parts.values()))
        # Each call may take its limit, and so may closing what it ended; an actor has so many threads at once.
        seconds = SLACK_SECONDS + 2 * self._timeout * ceil(most / self._threads)
        return gather(calls, seconds, f"{method} of environments")


def share(environments: Sequence[Actor], engine: int, engines: int) -> list[Actor]:
    """The environment actors of one of several rollout engines: as few engines as possible wait on one actor.

    >>> share(list("abcde"), 1, 2), share(list("ab"), 2, 3)
    (['b', 'd'], ['a'])
    """
    own = list(environments[engine::engines])
    return own or [environments[engine % len(environments)]]
