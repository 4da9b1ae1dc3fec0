"""Rewards from an HTTP service: several addresses, load spread over them, retries, a time limit.

A request is `POST {"prompts": [...], "completions": [...], "columns": {name: [...]}}`, the answer `{"rewards": [...]}`
with status 200 and one number, null or list a sample. Anything else fails the samples of that request (`batch_size: 1`
makes that one sample). JSON has no NaN and no infinity: those of columns are sent as null. Nothing of a header, of an
address's user part or query, or of an answer's body is ever shown.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from apportion.actors.outage import Outage
from apportion.actors.reward_call import Failure, RewardCall
from apportion.actors.reward_sources import RewardEntry
from apportion.actors.service_client import (
    FIRST_PAUSE_SECONDS,
    FailedOnRequest,
    Refused,
    Room,
    ServiceClient,
    check_status,
    parse_answer,
    secret_header,
)
from apportion.platform.addresses import shown_url, shown_urls
from apportion.platform.errors import ConfigError

# What an answer may take, beside what it may for each sample and each token of the responses (dense rewards). A service
# may say more than rewards: a short explanation of each, say.
SAMPLE_ROOM, TOKEN_ROOM, OTHER_ROOM = Room(4096, 256), Room(32, 2), Room(2**20, 10_000)


class ServiceSource:
    """One component of the reward, asked from `urls`: requests go to them in turn, a retry to the next one.

    Where there are several, an attempt has its share of the time that is left, the last one all of it, so that an
    address that accepts and never answers leaves time for another. One alone has all of it from the first attempt on:
    nobody else would be asked, and a slow answer is better than none.
    """

    def __init__(self, entry: RewardEntry) -> None:
        self.urls = entry.addresses
        self.name = entry.name or (urlsplit(self.urls[0]).hostname or "service")
        self.weight = entry.weight
        self._limit, self._retries, self._batch_size = entry.timeout_seconds, entry.retries, entry.batch_size
        self._paths = entry.columns
        headers = {}
        if entry.auth_env is not None:
            headers["Authorization"] = secret_header(entry.auth_env, f"reward.functions {self.name}: auth_env")
            if not headers["Authorization"]:
                raise ConfigError(
                    f"reward.functions {self.name}: environment variable {entry.auth_env} (auth_env) is not set"
                )
        # The header of auth_env goes before what an address's user part would become.
        self._client = ServiceClient(self.urls, headers, sends_user=entry.auth_env is None)
        self._turn = itertools.count()
        self._outage_seconds = entry.outage_seconds
        self.outage = Outage(self._shown(), "reward.outage_seconds", entry.outage_seconds or 0.0)

    def wait_by_default(self, seconds: float) -> None:
        """How long an outage is waited for, where the entry does not say."""
        if self._outage_seconds is None:
            self.outage = Outage(self._shown(), "reward.outage_seconds", seconds)

    def _shown(self) -> str:
        return f"reward service {self.name} at {shown_urls(self.urls)}"

    @property
    def hung(self) -> int:
        return 0

    def close(self) -> None:
        self._client.close()

    def missing_columns(self, columns: set[str]) -> list[str]:
        return [path for path in self._paths.values() if path not in columns]

    def score(self, call: RewardCall) -> list[Any]:
        call = call.with_columns(self._paths)
        size = self._batch_size or -(-len(call) // len(self.urls))
        chunks = [list(range(start, min(start + size, len(call)))) for start in range(0, len(call), size)]
        calls = [call.select(chunk) for chunk in chunks]
        answers = self._through_outages(calls)
        filled = [[a] * len(c) if isinstance(a, Failure) else a for a, c in zip(answers, calls, strict=True)]
        return [element for answer in filled for element in answer]

    def _through_outages(self, calls: list[RewardCall]) -> list[list[Any] | Failure]:
        """The answer to each request. Those that nobody answered are made again while the service is away."""
        answers: list[list[Any] | Failure] = [Failure("service", f"{self.name}: not asked")] * len(calls)
        waiting = list(range(len(calls)))
        while True:
            started = time.monotonic()
            for place, answer in zip(waiting, self._round([calls[i] for i in waiting]), strict=True):
                answers[place] = answer
            away = {i: a for i in waiting if isinstance(a := answers[i], Failure)}
            answered = [i for i in waiting if i not in away]
            if not away or self.outage.seconds <= 0:
                break
            # Where it still answers another request, the failure is about the request.
            if answered and not isinstance(self._round([calls[answered[0]]])[0], Failure):
                break
            first = next(iter(away.values()))
            if not self.outage.wait(first.text.partition("last: ")[2] or first.text, started):
                for place, failure in away.items():
                    waited = f"{failure.text}; it was waited for as long as {self.outage.key} allows"
                    answers[place] = Failure("away", waited)
                return answers
            waiting = list(away)
        self.outage.answered()
        return answers

    def _round(self, calls: list[RewardCall]) -> list[list[Any] | Failure]:
        deadline = time.monotonic() + self._limit
        with ThreadPoolExecutor(max_workers=min(len(calls), 4 * len(self.urls))) as pool:
            return list(pool.map(lambda call: self._ask(call, next(self._turn), deadline), calls))

    def _ask(self, call: RewardCall, turn: int, deadline: float) -> list[Any] | Failure:
        """The elements of one request; a list of failures where it was turned away or the service failed on it, one Failure
        where nobody answered."""
        body = {"prompts": call.prompts, "completions": call.completions, "columns": _finite(call.columns)}
        try:
            content = json.dumps(body, default=_plain, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            return self._failed(call, "service", f"the samples cannot be written as JSON ({error})")
        problem, there = "no attempt was made", False
        for attempt in range(self._retries + 1):
            url = self.urls[(turn + attempt) % len(self.urls)]
            left = deadline - time.monotonic()
            if left <= 0:
                text = f"no answer within {self._limit:g} s; last: {problem}"
                return self._failed(call, "service", text) if there else self._failure("timeout", text)
            try:
                return self._attempt(url, content, call, time.monotonic() + left / self._sharing(attempt))
            except Refused as error:
                return self._failed(call, "service", str(error))
            except ConnectionError as error:
                problem, there = str(error), there or isinstance(error, FailedOnRequest)
            if attempt < self._retries:  # at most half of what is left, or the last attempts would never be made
                time.sleep(max(0.0, min(FIRST_PAUSE_SECONDS * 2**attempt, (deadline - time.monotonic()) / 2)))
        text = f"{self._retries + 1} attempts failed; last: {problem}"
        if there:
            return self._failed(call, "service", text)
        return self._failure("timeout" if time.monotonic() >= deadline else "service", text)

    def _sharing(self, attempt: int) -> int:
        """How many attempts share the time that is left before this one: as many as there are addresses to try first."""
        return max(1, min(len(set(self.urls)), self._retries + 1) - attempt)

    def _attempt(self, url: str, content: bytes, call: RewardCall, deadline: float) -> list[Any]:
        """One request. ConnectionError where another attempt may help, Refused where not."""
        shown, expected, room = shown_url(url), len(call), _room(call)
        answer = self._client.post(url, content, deadline, room)
        check_status(answer.status, shown)
        if answer.status != 200:
            raise Refused("refused", f"{shown}: status {answer.status}, expected 200")
        form = "expected JSON of the form {'rewards': [...]}"
        try:
            said = parse_answer(answer.body, room)
        except ValueError as error:
            raise Refused("malformed", f"{shown}: the answer {error}, {form}") from None
        if not isinstance(said, dict) or "rewards" not in said:
            raise Refused("malformed", f"{shown}: the answer has no rewards, {form}")
        rewards = said["rewards"]
        if not isinstance(rewards, list) or len(rewards) != expected:
            got = len(rewards) if isinstance(rewards, list) else type(rewards).__name__
            raise Refused("malformed", f"{shown}: got {got} rewards for {expected} completions")
        return [self._element(reward) for reward in rewards]

    def _element(self, reward: Any) -> Any:
        """The element, or the Failure of one that is no reward, which does not quote it."""
        values = reward if isinstance(reward, list) else [reward]
        if reward is None or all(isinstance(value, int | float) for value in values):
            return reward
        kind = "a list with other than numbers" if isinstance(reward, list) else f"a {type(reward).__name__}"
        return self._failure("wrong_type", f"got {kind}, expected a number, null or a list of numbers")

    def _failed(self, call: RewardCall, reason: str, text: str) -> list[Any]:
        return [self._failure(reason, text)] * len(call)

    def _failure(self, reason: str, text: str) -> Failure:
        return Failure(reason, f"{self.name}: {text}")


def _room(call: RewardCall) -> Room:
    """What the answer to a request may take."""
    return OTHER_ROOM + SAMPLE_ROOM.times(len(call)) + TOKEN_ROOM.times(sum(map(len, call.completion_ids)))


def _finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity in it: one row's must not fail the request of all.

    >>> _finite({"level": [1.5, float("nan")], "text": ["nan", "inf"]})
    {'level': [1.5, None], 'text': ['nan', 'inf']}
    """
    if hasattr(value, "tolist"):  # arrays, and their numbers
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(element) for key, element in value.items()}
    return [_finite(element) for element in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """What JSON has no form for: arrays as lists, the rest (dates, decimals) as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
