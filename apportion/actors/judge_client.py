"""Who can be asked for critiques: an OpenAI-compatible address, a model of the run's own, a Python function.

Each takes cases (a question and the steps of a response) and gives k critiques of each. Nothing here raises for what a
judge does: a critique that cannot be used says why in `failure` and has no vote.

    unparseable, out_of_range, cut   the judge answered, but not with a verdict on these steps (cut: at max_tokens)
    no_opinion, raised               the function said None, or raised
    slow, down, refused, malformed   no answer in time; no connection or a failing service; a request turned away; an
                                     answer that is no chat completion
    too_long                         question, response and critique do not fit the judge's context

Never shown: a header, an address's user part or query, the body of an answer that is no critique.
"""

from __future__ import annotations

import inspect
import itertools
import json
import numbers
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from apportion.actors.engines import EngineSpec, Request, RolloutEngine, Sampling, make_engine, seed_of
from apportion.actors.outage import Outage
from apportion.actors.reward_call import LimitedCaller, failure_of
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
from apportion.algorithms.steps import critique_prompt, parse_verdict
from apportion.batch import Critique
from apportion.data.columns import own_copy
from apportion.data.errors import DataError
from apportion.data.functions import load_function
from apportion.data.prompts import PromptEncoder, check_characters, load_tokenizer
from apportion.platform.addresses import shown_url, shown_urls
from apportion.platform.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

ANSWERED = ("", "unparseable", "out_of_range", "cut", "no_opinion")  # the judge had its say; asking again is no help
# What an answer may take, beside what it may for each token of a critique.
TOKEN_ROOM, OTHER_ROOM = Room(256, 4), Room(2**20, 10_000)
_FAILURES = {"timeout": "slow", "hung": "slow", "raised": "raised"}  # of a called function, by the reward's words


@dataclass
class Case:
    """One response to be judged."""

    question: str
    steps: list[str]
    answer: str | None  # the reference answer, where there is one and the judge may see it
    columns: dict[str, Any] = field(default_factory=dict)  # the row's other columns

    def prompt(self) -> str:
        return critique_prompt(self.question, self.steps, self.answer)


class JudgeSource(Protocol):
    """One judge; another kind joins by implementing this."""

    name: str  # who is asked and how: part of the key under which its critiques are kept
    durable: bool  # whether critiques may be kept on disk, from one run to the next

    def content(self, case: Case) -> str:
        """All that this judge sees of a case."""
        ...

    def ask(self, cases: Sequence[Case], count: int, deadline: float) -> list[list[Critique]]:
        """`count` critiques of each case. What is not there at `deadline` (time.monotonic) has failed as slow."""
        ...

    def close(self) -> None: ...


def read_answer(answer: str, steps: int) -> Critique:
    """A judge's text as a critique of a response with so many steps.

    >>> read_answer("[2]", 3).wrong_steps, read_answer("[99]", 4).failure, read_answer("ok", 4).failure
    ([1], 'out_of_range', 'unparseable')
    """
    wrong = parse_verdict(answer, steps)
    if wrong is not None:
        return Critique(wrong, "", answer)
    listed = parse_verdict(answer, sys.maxsize) is not None
    return Critique(None, "out_of_range" if listed else "unparseable", answer)


def _unreadable(error: DataError) -> Critique:
    return Critique(None, "refused", detail=f"the judge's prompt cannot be read: {error}")


# a Python function


class FunctionJudge:
    """`f(question, steps, answer, **columns) -> list[int] | None`: the wrong steps, from 0, or None for no opinion.

    Sync or async, called once for each critique. Without `**columns` it gets those that it names. A function with a parameter `critique` is told which one it is (from
    0), so that a judge that errs at random can do so repeatably.
    """

    durable = False  # its source may change between two runs

    def __init__(self, spec: str, timeout_seconds: float) -> None:
        self.name = f"function:{spec}"
        self._function = load_function(spec)
        self._limit = timeout_seconds
        parameters = inspect.signature(self._function).parameters
        self._numbered = "critique" in parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._wanted = None if takes_all else frozenset(parameters)  # a function may name the columns that it reads
        self._caller = LimitedCaller(spec, inspect.iscoroutinefunction(self._function))

    def close(self) -> None:
        self._caller.close()

    def content(self, case: Case) -> str:
        return json.dumps([case.question, case.steps, case.answer, case.columns], sort_keys=True, default=str)

    def ask(self, cases: Sequence[Case], count: int, deadline: float) -> list[list[Critique]]:
        return [[self._critique(case, number, deadline) for number in range(count)] for case in cases]

    def _critique(self, case: Case, number: int, deadline: float) -> Critique:
        left = min(self._limit, deadline - time.monotonic())
        if left <= 0:
            return Critique(None, "slow", detail=f"{self.name}: the time for this batch was over before it was asked")
        arguments = {**case.columns, "question": case.question, "steps": case.steps, "answer": case.answer}
        if self._numbered:
            arguments["critique"] = number
        if self._wanted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._wanted}
        arguments = own_copy(arguments)  # a function that changes them changes nobody else's
        try:
            said = self._caller.call(lambda: self._function(**arguments), left)
        except Exception as error:  # noqa: BLE001 - whatever a user's function raises is a failure
            failure = failure_of(error, self.name)
            return Critique(None, _FAILURES[failure.reason], detail=failure.text)
        return _of_function(said, len(case.steps), self.name)


def _of_function(said: Any, steps: int, name: str) -> Critique:
    if said is None:
        return Critique(None, "no_opinion")
    said = said.tolist() if hasattr(said, "tolist") else said
    if not isinstance(said, list | tuple | set | frozenset) or any(
        not isinstance(step, numbers.Integral) or isinstance(step, bool) for step in said
    ):
        text = f"{name}: got {str(said)[:60]!r}, expected a list of steps from 0, or None"
        return Critique(None, "unparseable", detail=text)
    wrong = sorted({int(step) for step in said})
    if any(not 0 <= step < steps for step in wrong):
        return Critique(None, "out_of_range", detail=f"{name}: got {wrong} of {steps} steps, expected 0 to {steps - 1}")
    return Critique(wrong)


# a model of the run's own


@dataclass
class ModelJudgeSpec:
    engine: str
    engine_spec: EngineSpec
    temperature: float
    max_tokens: int


class ModelJudge:
    """A model on an engine of its own, in this process; its context is the engine's `max_model_len`."""

    durable = True

    def __init__(self, spec: ModelJudgeSpec, engine: RolloutEngine | None = None) -> None:
        settings = spec.engine_spec
        self._spec = spec
        tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
        self._encoder = PromptEncoder(tokenizer, chat=bool(tokenizer.chat_template))
        self.engine = engine or make_engine(spec.engine, settings)
        self._sampling = Sampling(spec.temperature, max_tokens=spec.max_tokens)
        self.name = f"model:{settings.model}:{spec.temperature:g}:{spec.max_tokens}:{settings.seed}"

    def close(self) -> None:
        return None

    def content(self, case: Case) -> str:
        return case.prompt()

    def ask(self, cases: Sequence[Case], count: int, deadline: float) -> list[list[Critique]]:
        prompts: dict[int, np.ndarray] = {}  # of the cases that are asked about
        out: list[list[Critique]] = []
        room = self._spec.engine_spec.max_model_len - self._spec.max_tokens
        for i, case in enumerate(cases):
            try:
                ids = self._encoder.token_ids(case.prompt())
            except DataError as error:
                out.append([_unreadable(error)] * count)
                continue
            # What is not overwritten below was not reached in time, or does not fit.
            out.append([Critique(None, "slow" if len(ids) <= room else "too_long")] * count)
            if len(ids) <= room:
                prompts[i] = ids
        places = [(i, k) for i in prompts for k in range(count)]
        # An engine cannot be interrupted: the deadline is looked at between calls, each large enough to keep it busy.
        size = 4 * self._spec.engine_spec.max_sequences
        for start in range(0, len(places), size):
            if time.monotonic() >= deadline:
                break
            chosen = places[start : start + size]
            requests = [Request(prompts[i], self._seed(prompts[i], k)) for i, k in chosen]
            for (i, k), sample in zip(chosen, self.engine.generate(requests, self._sampling), strict=True):
                whole = sample.finish_reason == "stop"
                out[i][k] = (
                    read_answer(sample.text, len(cases[i].steps)) if whole else Critique(None, "cut", sample.text)
                )
        return out

    def _seed(self, prompt: np.ndarray, k: int) -> int | None:
        """Of critique k, so that a run that is resumed is told the same; None where runs need not repeat."""
        settings = self._spec.engine_spec
        if not settings.seeded:
            return None
        return seed_of(f"{settings.seed}/{k}/".encode() + prompt.tobytes())


# an OpenAI-compatible address


@dataclass
class ServiceJudgeSpec:
    """`urls` up to the version (`http://host:8000/v1`). `context_tokens` is held against `count_tokens` of a prompt."""

    urls: list[str]
    model: str
    api_key_env: str | None
    temperature: float
    max_tokens: int
    context_tokens: int
    timeout_seconds: float  # of one critique, its retries included
    retries: int
    concurrency: int
    outage_seconds: float = 0.0  # how long an address that is away is waited for


class ServiceJudge:
    """Chat completions from one or several addresses: requests go to them in turn, a retry to the next one."""

    durable = True

    def __init__(self, spec: ServiceJudgeSpec, count_tokens: Callable[[str], int]) -> None:
        self._spec = spec
        self._count_tokens = count_tokens
        self.name = f"url:{spec.model}:{spec.temperature:g}:{spec.max_tokens}"
        headers = {}
        if spec.api_key_env is not None:
            key = secret_header(spec.api_key_env, "judge.api_key_env")
            if not key:
                raise ConfigError(
                    f"judge.api_key_env: got {spec.api_key_env}, which is not set, expected the key in it"
                )
            headers["Authorization"] = f"Bearer {key}"
        self._room = OTHER_ROOM + TOKEN_ROOM.times(spec.max_tokens)
        urls = [completions_address(url) for url in spec.urls]
        self._client = ServiceClient(urls, headers, spec.concurrency, idle_connections=None, sends_user=False)
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self.outage = Outage(
            f"judge {spec.model} at {shown_urls(spec.urls)}", "judge.outage_seconds", spec.outage_seconds
        )

    def close(self) -> None:
        self._client.close()

    def content(self, case: Case) -> str:
        return case.prompt()

    def ask(self, cases: Sequence[Case], count: int, deadline: float) -> list[list[Critique]]:
        places = [(case, case.prompt()) for case in cases for _ in range(count)]
        if not places:
            return []
        while True:
            started = time.monotonic()
            with ThreadPoolExecutor(max_workers=min(self._spec.concurrency, len(places))) as pool:
                flat = list(pool.map(lambda place: self._critique(place[0], place[1], deadline), places))
            away = [c for c in flat if c.failure in ("down", "slow")]
            if any(c.failure in ANSWERED for c in flat):
                self.outage.answered()
                break
            # Asked again as a whole: of those that are not away none had an answer either.
            if not away or not self.outage.wait(
                away[0].detail.partition("last: ")[2] or away[0].detail, started, deadline
            ):
                break
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _critique(self, case: Case, prompt: str, batch_deadline: float) -> Critique:
        spec = self._spec
        try:
            check_characters(prompt)
        except DataError as error:
            return _unreadable(error)
        if self._count_tokens(prompt) + spec.max_tokens > spec.context_tokens:
            return Critique(None, "too_long")
        deadline = min(batch_deadline, time.monotonic() + spec.timeout_seconds)
        message = {"role": "user", "content": prompt}
        body = {"model": spec.model, "messages": [message], "temperature": spec.temperature, "n": 1}
        content = json.dumps({**body, "max_tokens": spec.max_tokens}).encode()
        try:
            text, reason = self._attempts(content, deadline)
        except Refused as error:
            return Critique(None, error.reason, detail=str(error))
        return Critique(None, "cut", text) if reason == "length" else read_answer(text, len(case.steps))

    def _attempts(self, content: bytes, deadline: float) -> tuple[str, str]:
        """Text and finish reason of the first attempt that gives one; Refused with the reason where none does."""
        with self._lock:
            turn = next(self._turn)
        problem, there = "it was not asked in the time for this batch", False
        for attempt in range(self._spec.retries + 1):
            if time.monotonic() >= deadline:
                break
            url = self._spec.urls[(turn + attempt) % len(self._spec.urls)]
            try:
                return self._attempt(url, content, deadline)
            except ConnectionError as error:
                problem, there = str(error), there or isinstance(error, FailedOnRequest)
            if attempt < self._spec.retries:
                time.sleep(max(0.0, min(FIRST_PAUSE_SECONDS * 2**attempt, deadline - time.monotonic())))
        late = time.monotonic() >= deadline
        raise Refused("refused" if there else "slow" if late else "down", f"no critique; last: {problem}")

    def _attempt(self, url: str, content: bytes, deadline: float) -> tuple[str, str]:
        """One request. ConnectionError where another may help, Refused where not."""
        shown, answer = shown_url(url), self._client.post(completions_address(url), content, deadline, self._room)
        check_status(answer.status, shown)
        if answer.status != 200:
            long = answer.status in (400, 413, 422) and b"context" in answer.body.lower()
            raise Refused("too_long" if long else "refused", f"{shown}: status {answer.status}, expected 200")
        try:
            choice = parse_answer(answer.body, self._room)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason") or "stop"
        except ValueError as error:
            raise Refused("malformed", f"{shown}: the answer {error}, expected a chat completion") from None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Refused("malformed", f"{shown}: the answer is no chat completion") from None
        if not isinstance(text, str):
            raise Refused("malformed", f"{shown}: got a {type(text).__name__} for the message, expected text")
        return text, str(reason)


def completions_address(url: str) -> str:
    """
    >>> completions_address("http://127.0.0.1:8000/v1/")
    'http://127.0.0.1:8000/v1/chat/completions'
    """
    base, mark, query = url.partition("?")
    base = base.rstrip("/")
    return (base if base.endswith("/chat/completions") else f"{base}/chat/completions") + mark + query
