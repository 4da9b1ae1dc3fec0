"""Environments of other libraries behind ours: TextArena's games and Gymnasium's API. Neither library is needed unless
its adapter is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apportion.data.environments import Step, normal
from apportion.data.errors import DataError, nearest
from apportion.data.functions import load_function


class GymnasiumText:
    """An environment with Gymnasium's API: `reset(seed, options) -> (observation, info)` and
    `step(action) -> (observation, reward, terminated, truncated, info)`.

    `id` is what `gymnasium.make` takes (with `make`, keyword arguments of it), or a dotted path of a class or function
    that makes one. Observations are shown as text: those that are text as they are, others by `render` (with
    `observe: render`, for environments made with render_mode="ansi") or by a function of one's own
    (`observe: my.module:describe`). `actions` names the actions of a Discrete space in order ([left, down, right, up]);
    without it the environment is given the policy's text. Text that names no action earns `wrong_action` and changes
    nothing; after `max_wrong` of them in a row the episode ends, cut by a limit.
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
        self._environment = _made(id, dict(make or {}))
        self._actions = None if actions is None else {normal(name): index for index, name in enumerate(actions)}
        self._names = list(actions or [])
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
        if self._actions is not None:
            if normal(action) not in self._actions:
                return self._not_understood()
            given = self._actions[normal(action)]
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


def plain_render(text: str) -> str:
    """Text without a terminal's codes; what they highlight, often where the player stands, is put in brackets.

    >>> plain_render("\\x1b[41mS\\x1b[0mFF")
    '[S]FF'
    """
    return re.sub(r"\x1b\[[0-9;]*m", "", re.sub(r"\x1b\[[0-9;]+m(.*?)\x1b\[0m", r"[\1]", text, flags=re.DOTALL))


def _made(id: str, arguments: dict[str, Any]) -> Any:
    if ":" in id or ("." in id and not id.rpartition(".")[2].isdigit()):
        return load_function(id)(**arguments)
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise DataError("environment.cls: gymnasium is not installed; pip install gymnasium") from error
    try:
        return gymnasium.make(id, **arguments)
    except gymnasium.error.UnregisteredEnv as error:
        raise DataError(f"gymnasium: got {id!r}, no such environment{nearest(id, gymnasium.registry)}") from error


class TextArenaGame:
    """A game of TextArena. The policy is `player`; `opponent` plays the others: a dotted path of a function from
    (observation, seed) to an action, needed for games of more than one player.

    The reward of the game comes with the last step. An observation is what is new to the player since its last turn,
    its own moves left out, since they stand in its context already.
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
        self._game = textarena.make(id, **dict(make or {}))
        self._players, self._player = players, player
        self._opponent = None if opponent is None else load_function(opponent)
        self._seen = self._said = ""  # all that was observed; the policy's last action

    def reset(self, seed: int = 0) -> str:
        self._seed = seed
        self._game.reset(num_players=self._players, seed=seed)
        observation, done = self._until_my_turn()
        if done:
            raise DataError("textarena: the game was over before the policy's first turn")
        return observation

    def step(self, action: str) -> Step:
        self._said = action
        done, info = self._game.step(action=action)
        observation = ""
        if not done:
            observation, done = self._until_my_turn()
        if not done:
            return observation, 0.0, False, dict(info or {})
        rewards, _ = self._game.close()
        if rewards is None or self._player not in rewards:
            raise DataError(
                f"textarena: the game ended with rewards {rewards!r}, expected one for player {self._player}"
            )
        return observation, float(rewards[self._player]), True, dict(info or {})

    def _until_my_turn(self) -> tuple[str, bool]:
        """What the policy sees at its next turn, or that the game is over."""
        while True:
            player, observation = self._game.get_observation()
            if player == self._player:
                return self._new_text(observation), False
            assert self._opponent is not None
            done, _ = self._game.step(action=self._opponent(_written(observation, None), self._seed))
            if done:
                return "", True

    def _new_text(self, observation: Any) -> str:
        text = _written(observation, self._player)
        if isinstance(observation, str):  # a wrapper that repeats the whole history
            new = text.removeprefix(self._seen)
            self._seen = text
            first, _, rest = new.strip().partition("\n")
            own = bool(self._said) and first.startswith("[") and first.endswith(self._said.strip())
            return rest if own else new.strip()
        return text


def _written(observation: Any, me: int | None) -> str:
    """Messages (sender, text, kind) as lines, without those that `me` sent."""
    if isinstance(observation, str):
        return observation
    return "\n".join(str(text) for sender, text, *_ in observation if me is None or sender != me)
