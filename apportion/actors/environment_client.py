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
    """Instances of one owner on `actors`; an episode stays on the actor that its number gives.

    `sharing`: owners that one actor serves, one call after the other, this one included.
    """

    def __init__(
        self, actors: Sequence[Actor], owner: str, step_timeout_seconds: float, threads: int, sharing: int = 1
    ) -> None:
        self._actors, self._owner = list(actors), owner
        self._timeout, self._threads, self._sharing = step_timeout_seconds, threads, sharing
        self._largest = 0  # part that one actor was given; other owners' batches are about as large

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
        return gather(calls, self._seconds(max(map(len, parts.values()))), f"{method} of environments")

    def _seconds(self, most: int) -> float:
        """How long a call about `most` instances of one actor may take, with those that the actor has to answer before.

        Each instance may take its limit, twice where an event loop is blocked, and so may closing what it ended; an actor
        has so many threads at once.
        """
        self._largest = max(self._largest, most)
        rounds = ceil(most / self._threads) + (self._sharing - 1) * ceil(self._largest / self._threads)
        return SLACK_SECONDS + 4 * self._timeout * rounds


def share(environments: Sequence[Actor], engine: int, engines: int) -> list[Actor]:
    """The environment actors of one of several rollout engines: as few engines as possible wait on one actor.

    >>> share(list("abcde"), 1, 2), share(list("ab"), 2, 3)
    (['b', 'd'], ['a'])
    """
    own = list(environments[engine::engines])
    return own or [environments[engine % len(environments)]]


def sharing(environments: int, engines: int) -> int:
    """The most engines that `share` leads to one environment actor.

    >>> sharing(1, 8), sharing(2, 3), sharing(5, 2)
    (8, 2, 1)
    """
    return ceil(engines / environments)
