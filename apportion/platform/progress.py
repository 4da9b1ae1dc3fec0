"""Progress of a call that takes long. A busy actor cannot answer, since it has one thread, so it counts what it does, and a
second thread leaves the count in Ray's key-value store: one key an actor, overwritten. The driver reads it while it waits,
and a call is late only when its actor has made no progress for as long as the limit says."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from apportion.platform.messages import say

KEY = "APPORTION_PROGRESS"  # in an actor's environment: the key of its count
NAMESPACE = "apportion-progress"
TELL_SECONDS = 5.0  # at least, between two counts that an actor leaves
LOOK_SECONDS = 20.0  # between two looks of the driver
ANSWER_SECONDS = 10.0  # that a look may take, once a call seems late


@dataclass(frozen=True)
class Count:
    """`done` units of work in an actor's `call`-th counted call."""

    call: int
    done: int
    unit: str

    def text(self) -> str:
        return f"{self.call} {self.done} {self.unit}"

    @staticmethod
    def of(text: str) -> Count:
        call, done, unit = text.split(" ", 2)
        return Count(int(call), int(done), unit)


class Counter:
    """Counts in an actor's process. `send` is called by a thread of its own, and not more often than every few seconds."""

    def __init__(self, send: Callable[[str], None], every: float = TELL_SECONDS) -> None:
        self._send, self._every = send, every
        self._count = self._told = Count(0, 0, "")
        self._thread: threading.Thread | None = None

    def begin(self, unit: str) -> None:
        """A call begins that counts `unit`s (plural)."""
        self._count = Count(self._count.call + 1, 0, unit)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def advance(self) -> None:
        self._count = Count(self._count.call, self._count.done + 1, self._count.unit)

    def tell(self) -> None:
        """Leave the count where the driver can read it, if it is new."""
        count = self._count
        if count != self._told:
            self._send(count.text())
            self._told = count

    def _run(self) -> None:
        said = False
        while True:
            time.sleep(self._every)
            try:
                self.tell()
                said = False
            except Exception as error:  # noqa: BLE001 - whatever the kind: a GCS that is restarted answers again later
                if not said:
                    say(f"progress is not told: {type(error).__name__}: {error}")
                said = True


_counter: Counter | None = None


def begin(unit: str) -> None:
    """In an actor: a call begins that counts `unit`s. Elsewhere nothing."""
    global _counter
    key = os.environ.get(KEY)
    if _counter is None and key:
        _counter = Counter(lambda text: _put(key, text))
    if _counter is not None:
        _counter.begin(unit)


def advance() -> None:
    """One unit more is done."""
    if _counter is not None:
        _counter.advance()


class Clocks:
    """When each awaited actor made progress last. Actors are named by the keys of their counts; one without a count, or
    whose key is empty, has the plain limit from the start of the wait."""

    def __init__(
        self,
        keys: Iterable[str],
        seconds: float,
        read: Callable[[Collection[str]], dict[str, str]] | None = None,
        now: Callable[[], float] = time.monotonic,
        aside: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """`read` gives the counts of keys; `aside` runs it, by default in a thread: a call into Ray may hang."""
        self._seconds, self._now = seconds, now
        self._read, self._aside = read or _get, aside or _in_thread
        self.every = min(LOOK_SECONDS, seconds / 4)
        self._looked = self._answered = start = now()
        self._last = dict.fromkeys(keys, start)
        self._counts: dict[str, Count] = {}
        self._answers: deque[tuple[float, dict[str, str]]] = deque()  # filled by one thread and emptied by another
        self._looking = False

    def look(self, keys: Iterable[str]) -> None:
        """Read the counts of `keys` where that is due. Never waits for Ray."""
        while self._answers:
            began, texts = self._answers.popleft()
            for key, text in texts.items():
                self._take(key, text, began)
            self._answered = began
        wanted, now = sorted({key for key in keys if key}), self._now()
        unsure = any(self._looked < self._last[key] + self._seconds <= now for key in wanted)
        if wanted and not self._looking and (unsure or now >= self._looked + self.every):
            self._looked, self._looking = now, True
            self._aside(lambda: self._ask(wanted, now))

    def left(self, key: str) -> float:
        """Seconds until the actor is late; 0 where it is. Before it counts as late, its count is read once more."""
        now, due = self._now(), self._last[key] + self._seconds
        if now < due:
            return due - now
        if not key or self._answered >= due or now > due + ANSWER_SECONDS:
            return 0.0
        return 0.1

    def count(self, key: str) -> Count | None:
        return self._counts.get(key)

    def _take(self, key: str, text: str, began: float) -> None:
        count = Count.of(text)
        if count != self._counts.get(key):
            self._counts[key], self._last[key] = count, began

    def _ask(self, keys: list[str], began: float) -> None:
        try:
            self._answers.append((began, self._read(keys)))
        except Exception:  # noqa: BLE001 - Ray ends or is lost, which `health` tells: no answer, as from one that hangs
            pass
        finally:
            self._looking = False


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="progress-look", daemon=True).start()


def _get(keys: Collection[str]) -> dict[str, str]:
    from ray.experimental import internal_kv

    found = {key: internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys}
    return {key: value.decode() for key, value in found.items() if value is not None}


def _put(key: str, text: str) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, text, namespace=NAMESPACE)


def forget(mark: str) -> None:
    """Remove the counts of every actor whose key begins with `mark`."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(mark, del_by_prefix=True, namespace=NAMESPACE)
