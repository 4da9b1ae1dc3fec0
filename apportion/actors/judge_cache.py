"""Critiques kept by their content: in memory, and as one JSON file each in a folder that runs may share.

Only whole sets of answers are kept; a critique that failed because the judge was down or late is asked again. A folder
that cannot be read or written costs time, not the run: the first problem is told, and memory goes on. A file may be
anybody's who shares the folder: what is in it is checked like a judge's answer.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from apportion.actors.judge_client import ANSWERED
from apportion.batch import Critique
from apportion.platform.files import write_text_atomically
from apportion.platform.foreign import parse_json, read_text
from apportion.platform.known_secrets import without_known

FORMAT = 1  # part of every key, so that a change of meaning finds nothing old
KEPT_IN_MEMORY = 20_000
LARGEST_FILE = 2**24  # bytes


def critique_key(judge: str, content: str, count: int) -> str:
    """The name under which `count` critiques of what `judge` saw are kept."""
    return hashlib.sha256(json.dumps([FORMAT, judge, content, count]).encode()).hexdigest()


class CritiqueCache:
    """`folder` None: in memory alone."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: OrderedDict[str, list[Critique]] = OrderedDict()
        self.problem: str | None = None  # the first one with the folder

    def get(self, key: str, count: int, steps: int) -> list[Critique] | None:
        """What is kept under `key`: `count` critiques of a response with so many steps."""
        known = self._memory.get(key)
        if known is not None:
            self._memory.move_to_end(key)
            return known
        found = self._read(key, count, steps)
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, key: str, critiques: list[Critique]) -> None:
        self._remember(key, critiques)
        if self._folder is None:
            return
        file = self._file(key)
        text = json.dumps(without_known([vars(critique) for critique in critiques]), ensure_ascii=False)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(file, text)
        except (OSError, UnicodeEncodeError) as error:
            self._told(f"{self._folder}: a critique could not be kept ({error})")

    def _remember(self, key: str, critiques: list[Critique]) -> None:
        self._memory[key] = critiques
        if len(self._memory) > KEPT_IN_MEMORY:
            self._memory.popitem(last=False)

    def _read(self, key: str, count: int, steps: int) -> list[Critique] | None:
        if self._folder is None:
            return None
        file = self._file(key)
        try:
            return _critiques(parse_json(read_text(file, LARGEST_FILE)), count, steps)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._told(f"{file}: a kept critique cannot be read, so it is asked again ({error})")
        except ValueError as error:
            self._told(f"{file}: no kept critique, so it is asked again ({error})")
        return None

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"

    def _told(self, problem: str) -> None:
        self.problem = self.problem or problem


def _critiques(value: Any, count: int, steps: int) -> list[Critique]:
    """What a file holds; ValueError for anything else than `count` critiques."""
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"expected a list of {count} critiques")
    return [_critique(entry, steps) for entry in value]


def _critique(entry: Any, steps: int) -> Critique:
    texts = ("failure", "answer", "detail")
    if not isinstance(entry, dict) or set(entry) != {"wrong_steps", *texts}:
        raise ValueError("expected wrong_steps, failure, answer and detail")
    wrong = entry["wrong_steps"]
    named = [] if wrong is None else wrong
    if not isinstance(named, list) or not all(type(step) is int and 0 <= step < steps for step in named):
        raise ValueError(f"expected wrong_steps from 0 to {steps - 1}")
    if not all(isinstance(entry[name], str) for name in texts):
        raise ValueError("expected texts")
    if entry["failure"] not in ANSWERED or (wrong is None) != bool(entry["failure"]):
        raise ValueError(f"expected wrong_steps, or a failure of {', '.join(filter(None, ANSWERED))}")
    return Critique(**entry)
