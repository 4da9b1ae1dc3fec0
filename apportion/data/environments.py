"""Environments that a policy acts in by text: what one looks like, the built-in ones, and finding one by name.

    reset(**row) -> observation              both may be `async def`
    step(action) -> (observation, reward, done, info)
    close()                                  optional

`reset` is given those columns of the data's row that it names (all of them if it takes **kwargs), and, where it names
it, `seed`, which the episodes of one prompt share. `info["truncated"]` set to True beside `done` says that a limit
ended the episode, not the task: the value of what would follow is then unknown, not 0. One instance plays one episode.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from apportion.data.errors import DataError, nearest
from apportion.data.functions import load_function

Step = tuple[str, float, bool, dict[str, Any]]  # observation, reward, done, info


class Environment(Protocol):
    """An environment without `async`; an asynchronous one has the same methods as coroutines."""

    def reset(self, **row: Any) -> str: ...
    def step(self, action: str) -> Step: ...


class Microwave:
    """Heat food in a microwave: open it, put the food in, close it. The case study of POAD (arXiv 2405.15821), as text.

    Three actions in the right order reach the goal and give +1; an episode that has not reached it after `steps` actions
    ends with -1. An action that the state does not allow, or that is none of the three, changes nothing and costs a
    step; closing the empty microwave undoes opening it. `wrong_action` is added for text that is no action at all.

    >>> kitchen = Microwave()
    >>> kitchen.reset(food="soup")
    'The microwave is closed. The soup is on the table.\\nActions: open the microwave, put it in the microwave, close the microwave'
    >>> [kitchen.step(a)[1:3] for a in ("Open the microwave.", "put it in the microwave", "close the microwave")]
    [(0.0, False), (0.0, False), (1.0, True)]
    """

    actions: ClassVar = {"open": "open the microwave", "put": "put it in the microwave", "close": "close the microwave"}

    def __init__(self, steps: int = 5, wrong_action: float = 0.0, shuffle: bool = False) -> None:
        if steps < 1:
            raise DataError(f"microwave: got steps={steps}, expected at least 1")
        self._steps, self._wrong_action, self._shuffle = steps, wrong_action, shuffle

    def reset(self, food: str = "pancake", seed: int = 0) -> str:
        """The first observation; `shuffle` lists the actions in an order that follows from `seed`."""
        self._food, self._open, self._inside, self._taken = food, False, False, 0
        listed = list(self.actions.values())
        if self._shuffle:
            random.Random(seed).shuffle(listed)
        return f"{self._state()}\nActions: {', '.join(listed)}"

    def step(self, action: str) -> Step:
        self._taken += 1
        known = {normal(text): verb for verb, text in self.actions.items()}
        verb = known.get(normal(action))
        reward = 0.0 if verb else self._wrong_action
        changed = self._act(verb)
        if self._inside and not self._open:
            return f"The {self._food} is heated.", reward + 1.0, True, {}
        if self._taken == self._steps:
            return "Too late.", reward - 1.0, True, {}
        return self._state() if changed else f"Nothing happens. {self._state()}", reward, False, {}

    def _act(self, verb: str | None) -> bool:
        """Whether anything changed."""
        before = (self._open, self._inside)
        if verb == "open":
            self._open = True
        elif verb == "close":
            self._open = False
        elif verb == "put" and self._open:
            self._inside = True
        return before != (self._open, self._inside)

    def _state(self) -> str:
        door, place = "open" if self._open else "closed", "in it" if self._inside else "on the table"
        return f"The microwave is {door}. The {self._food} is {place}."


def normal(text: str) -> str:
    """Words alone, in small letters: what makes two ways to write an action the same.

    >>> normal(" Open the  Microwave.\\n")
    'open the microwave'
    """
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


FOODS = (
    "pancake", "soup", "pizza", "rice", "milk", "bread", "pasta", "stew", "pie", "fish", "corn", "bacon",
    "chicken", "potato", "waffle", "burger", "curry", "noodles", "beans", "cake", "tea", "toast", "lasagna", "salmon",
)  # fmt: skip
MICROWAVE_PROMPT = "Heat the {food} in the microwave. Answer with one action from the list, nothing else."


def microwave_rows(held_out: bool = False, prompt: str = MICROWAVE_PROMPT) -> Iterator[dict[str, Any]]:
    """A row a food, for `function:apportion.data.environments:microwave_rows`; every third food is held out."""
    for index, food in enumerate(FOODS):
        if (index % 3 == 2) == held_out:
            yield {"prompt": prompt.format(food=food), "food": food}


def numbered_rows(prompt: str, count: int = 64, first_seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` rows with one prompt and a `seed` of their own: data for an environment that makes its own tasks."""
    for seed in range(first_seed, first_seed + count):
        yield {"prompt": prompt, "seed": seed}


ENVIRONMENTS: dict[str, str] = {
    "microwave": "apportion.data.environments:Microwave",
    "gymnasium": "apportion.data.environment_adapters:GymnasiumText",
    "textarena": "apportion.data.environment_adapters:TextArenaGame",
}


def load_environment(name: str) -> Any:
    """The class of a built-in environment, or of one's own by `package.module:Class` or `file.py:Class`."""
    if name in ENVIRONMENTS:
        return load_function(ENVIRONMENTS[name])
    if ":" not in name and "." not in name:
        raise DataError(
            f"environment.cls: got {name!r}, expected one of {', '.join(ENVIRONMENTS)}, package.module:Class or "
            f"file.py:Class{nearest(name, ENVIRONMENTS)}"
        )
    found = load_function(name)
    for method in ("reset", "step"):
        if not callable(getattr(found, method, None)):
            raise DataError(f"environment.cls: {name} has no {method}(), expected reset(**row) and step(action)")
    return found
