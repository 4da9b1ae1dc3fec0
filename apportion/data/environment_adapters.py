"""Environments of other libraries behind ours: TextArena's games and Gymnasium's API. Neither library is needed unless
its adapter is used.
"""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from apportion.data.environments import Step, normal
from apportion.data.errors import DataError, nearest
from apportion.data.functions import load_function

T = TypeVar("T")


class GymnasiumText:
    """An environment with Gymnasium's API: `reset(seed, options) -> (observation, info)` and
    `step(action) -> (observation, reward, terminated, truncated, info)`.

    `id` is what `gymnasium.make` takes (with `make`, keyword arguments of it), or a dotted path of a class or function
    that makes one. Observations are shown as text: those that are text as they are, others by `render` (with
    `observe: render`, for environments made with render_mode="ansi") or by a function of one's own
    (`observe: my.module:describe`). `actions` names the actions of a Discrete space in order ([left, down, right, up]);
    without it the environment is given the policy's text. A name is known as it is written (spaces around it apart), and
    by its words alone where these are no other's ("Left." is left; of < and > neither has any). Text that names no
    action earns `wrong_action` and changes nothing; after `max_wrong` of them in a row the episode ends, cut by a limit.
    """

    def __init__(
        self,
        id: str,
        make: Mapping[str, Any] | None = None,
        actions: Sequence[str] | None = None,
        observe: str | None = None,
        wrong_action: float = 0.0,
        max_wrong: int = 8,
    ) -> None:
        self._names = list(actions or [])
        self._written, self._words = _by_name(self._names)
        self._environment = _made(id, dict(make or {}))
        count = getattr(getattr(self._environment, "action_space", None), "n", None)
        if self._names and count is not None and count != len(self._names):
            raise DataError(f"gymnasium: got actions {self._names!r}, expected one for each of the {count} of {id}")
        self._observe: Callable[[Any], str] | None = None
        if observe == "render":
            self._observe = lambda _: plain_render(str(self._environment.render()))
        elif observe is not None:
            self._observe = load_function(observe)
        self._wrong_action, self._max_wrong, self._wrong = wrong_action, max_wrong, 0

    def reset(self, seed: int = 0, options: dict[str, Any] | None = None) -> str:
        observation, _ = self._environment.reset(seed=seed, options=options)
        return self._text(observation)

    def step(self, action: str) -> Step:
        given: Any = action
        if self._names:
            given = self._written.get(action.strip(), self._words.get(normal(action)))
            if given is None:
                return self._not_understood()
        self._wrong = 0
        observation, reward, terminated, truncated, info = self._environment.step(given)
        ended = {"truncated": bool(truncated) and not terminated}
        return self._text(observation), float(reward), bool(terminated or truncated), {**info, **ended}

    def close(self) -> None:
        self._environment.close()

    def _not_understood(self) -> Step:
        self._wrong += 1
        over = self._wrong >= self._max_wrong
        return f"Expected one of: {', '.join(self._names)}", self._wrong_action, over, {"truncated": over}

    def _text(self, observation: Any) -> str:
        if self._observe is not None:
            return self._observe(observation)
        if isinstance(observation, str):
            return observation
        kind = type(observation).__name__
        raise DataError(
            f"gymnasium: got an observation of type {kind}, expected text; "
            "set environment.params.observe to render or to a function that describes it"
        )


def _by_name(names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Each action by its name as it is written, and by the words of its name where no other has the same.

    >>> _by_name(["Go left", "<", "go!", "Go"])
    ({'Go left': 0, '<': 1, 'go!': 2, 'Go': 3}, {'go left': 0})
    """
    written = {name.strip(): index for index, name in enumerate(names) if isinstance(name, str)}
    if len(written) < len(names) or "" in written:
        raise DataError(f"gymnasium: got actions {list(names)!r}, expected texts that are neither empty nor the same")
    shared = Counter(map(normal, written))
    return written, {normal(name): i for name, i in written.items() if normal(name) and shared[normal(name)] == 1}


def plain_render(text: str) -> str:
    """Text without a terminal's codes; what they highlight, often where the player stands, is put in brackets.

    >>> plain_render("\\x1b[41mS\\x1b[0mFF")
    '[S]FF'
    """
    return re.sub(r"\x1b\[[0-9;]*m", "", re.sub(r"\x1b\[[0-9;]+m(.*?)\x1b\[0m", r"[\1]", text, flags=re.DOTALL))


def is_path(id: str) -> bool:
    """Whether this names a class or function of one's own rather than one of Gymnasium's environments.

    >>> is_path("FrozenLake-v1"), is_path("my.module:Corridor")
    (False, True)
    """
    return ":" in id or ("." in id and not id.rpartition(".")[2].isdigit())


def _made(id: str, arguments: dict[str, Any]) -> Any:
    if is_path(id):
        return load_function(id)(**arguments)
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise DataError("environment.cls: gymnasium is not installed; pip install gymnasium") from error
    try:
        return gymnasium.make(id, **arguments)
    except gymnasium.error.UnregisteredEnv as error:
        raise DataError(f"gymnasium: got {id!r}, no such environment{nearest(id, gymnasium.registry)}") from error


_DRAWING = threading.Lock()  # held by whoever draws from the process's generators


class _OwnDraws:
    """Has calls draw from Python's and numpy's global generators, as TextArena's games do, as if they were alone: each
    goes on where the one before it stopped, whatever other threads' calls draw between. One call at a time."""

    def __init__(self, seed: Any) -> None:
        import numpy as np  # not for `plan`, which only looks

        own = random.Random(seed)
        self._python = own.getstate()
        self._numpy = np.random.RandomState(own.getrandbits(32)).get_state()

    def during(self, call: Callable[[], T]) -> T:
        import numpy as np

        with _DRAWING:
            outside = random.getstate(), np.random.get_state()
            random.setstate(self._python)
            np.random.set_state(self._numpy)
            try:
                return call()
            finally:
                self._python, self._numpy = random.getstate(), np.random.get_state()
                random.setstate(outside[0])
                np.random.set_state(outside[1])


class TextArenaGame:
    """A game of TextArena. The policy is `player`; `opponent` plays the others: a dotted path of a function from
    (observation, seed) to an action, needed for games of more than one player.

    The reward of the game comes with the last step. An observation is what is new to the player since its last turn,
    its own moves left out, since they stand in its context already. Games of one seed draw the same, whatever is played
    beside them: one call of a game at a time in a process. The opponent is not held to that, since it may wait for a
    service; what it draws should come from a generator of its own.
    """

    def __init__(
        self,
        id: str,
        players: int = 1,
        player: int = 0,
        opponent: str | None = None,
        make: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= player < players:
            raise DataError(f"textarena: got player={player} of players={players}, expected 0 to {players - 1}")
        if players > 1 and opponent is None:
            raise DataError(f"textarena: got players={players} without opponent, expected a function that plays them")
        try:
            import textarena
        except ModuleNotFoundError as error:
            raise DataError(f"environment.cls: textarena needs {error.name}; pip install textarena") from error
        self._make = lambda: textarena.make(id, **dict(make or {}))
        self._players, self._player = players, player
        self._opponent = None if opponent is None else load_function(opponent)
        self._seen = self._said = ""  # all that was observed; the policy's last action

    def reset(self, seed: int = 0) -> str:
        self._seed, self._draws = seed, _OwnDraws(seed)
        self._game = self._draws.during(self._make)  # not before, since games may draw when they are made
        self._draws.during(lambda: self._game.reset(num_players=self._players, seed=seed))
        observation, done = self._until_my_turn()
        if done:
            raise DataError("textarena: the game was over before the policy's first turn")
        return observation

    def step(self, action: str) -> Step:
        self._said = action
        done, info = self._act(action)
        observation = ""
        if not done:
            observation, done = self._until_my_turn()
        if not done:
            return observation, 0.0, False, dict(info or {})
        rewards, _ = self._draws.during(self._game.close)
        if rewards is None or self._player not in rewards:
            raise DataError(
                f"textarena: the game ended with rewards {rewards!r}, expected one for player {self._player}"
            )
        return observation, float(rewards[self._player]), True, dict(info or {})

    def _act(self, action: str) -> tuple[bool, Any]:
        return self._draws.during(lambda: self._game.step(action=action))

    def _until_my_turn(self) -> tuple[str, bool]:
        """What the policy sees at its next turn, or that the game is over."""
        while True:
            player, observation = self._draws.during(self._game.get_observation)
            if player == self._player:
                return self._new_text(observation), False
            assert self._opponent is not None
            done, _ = self._act(self._opponent(_lines(observation), self._seed))
            if done:
                return "", True

    def _new_text(self, observation: Any) -> str:
        if isinstance(observation, str):  # a wrapper that repeats the whole history
            new = observation.removeprefix(self._seen)
            self._seen = observation
            return without_own_move(new, self._said).strip()
        own = {self._said.strip(), f"[{self._said.strip()}]"} if self._said.strip() else set()
        # Some games show a move as if it were their own message; it is the first since the last turn.
        if observation and observation[0][0] < 0 and str(observation[0][1]).strip() in own:
            observation = observation[1:]
        return _lines([message for message in observation if message[0] != self._player])


def without_own_move(text: str, said: str) -> str:
    """What follows `[name] said` where the text begins with that, whole lines of it, in brackets of a wrapper or not.

    >>> without_own_move("[Player 0] [I go\\nup]\\n[GAME] a wall", "I go\\nup")
    '\\n[GAME] a wall'
    """
    own = re.escape(said.strip())
    if not own:
        return text
    return re.sub(rf"\A\s*\[[^\]\n]*\]\s+(?:{own}|\[\s*{own}\s*\])[ \t]*(?=\n|\Z)", "", text)


def _lines(observation: Any) -> str:
    """Messages (sender, text, kind) as lines."""
    if isinstance(observation, str):
        return observation
    return "\n".join(str(message[1]) for message in observation)
