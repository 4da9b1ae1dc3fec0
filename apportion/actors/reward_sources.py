"""Where rewards come from: a Python function here; a service and a reward model in the files beside this one.

Every source gives, for a call of n samples, n elements: what was said of the sample, or a Failure. What an element may
be is judged in `scoring`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from apportion.actors.reward_call import (
    ASYNC_GRACE_SECONDS,
    CallTimeout,
    Failure,
    LimitedCaller,
    RewardCall,
    TooManyHung,
    failure_of,
    within,
)
from apportion.data.columns import answer_path, own_copy
from apportion.data.errors import DataError
from apportion.data.functions import load_function
from apportion.data.verifiers import COLUMNS, IN_A_PROCESS, VERIFIERS, check_settings
from apportion.platform.addresses import address_problem, shown_url
from apportion.platform.errors import ConfigError, nearest

RESERVED = ("prompts", "completions", "prompt_ids", "completion_ids")
HUNG_SAMPLES = 4  # samples of one call that may run into the time limit before the rest is given up


class RewardSource(Protocol):
    """One component of the reward."""

    name: str
    weight: float

    @property
    def hung(self) -> int: ...  # calls given up and still busy

    def score(self, call: RewardCall) -> list[Any]: ...  # one element a sample, a Failure where there is none

    def missing_columns(self, columns: set[str]) -> list[str]: ...

    def close(self) -> None: ...


@dataclass
class RewardEntry:
    """What the configuration says of one component. `function` is a dotted path, `file.py:function`, a verifier's name,
    `model:PATH` or an address; a service with several addresses has `urls` instead."""

    function: str | Callable[..., Any] | None = None
    urls: list[str] | None = None  # a text is a list of one
    weight: float = 1.0
    timeout_seconds: float = 60.0
    name: str | None = None  # null: the function's
    params: dict[str, Any] = field(default_factory=dict)  # keyword arguments of a function, settings of a model
    columns: dict[str, str] = field(default_factory=dict)  # argument -> the data's column, or a path inside one
    one_by_one: bool = False  # functions: called for one sample at a time
    batch_size: int | None = None  # services: samples of a request; models: sequences of a forward pass
    retries: int = 3  # services: further attempts of a request
    auth_env: str | None = None  # services: environment variable that holds the Authorization header
    outage_seconds: float | None = (
        None  # services: how long one that is away is waited for; null: reward.outage_seconds
    )

    def __post_init__(self) -> None:
        if isinstance(self.urls, str):
            self.urls = [self.urls]
        elif isinstance(self.urls, Sequence):
            self.urls = list(self.urls)
        for key in ("params", "columns"):
            if isinstance(getattr(self, key), Mapping):
                setattr(self, key, dict(getattr(self, key)))
        if (self.function is None) == (self.urls is None):
            given = "neither" if self.function is None else "both"
            raise ConfigError(f"reward.functions: got {given} of function and urls, expected one of the two")
        for key, (fits, expected) in _EXPECTED.items():
            value = getattr(self, key)
            if not fits(value):
                got = "addresses" if key == "urls" else f"{key} {value!r}"  # an address may hold a password
                raise ConfigError(f"reward.functions {self._shown()}: got {got}, expected {expected}")

    def _shown(self) -> str:
        """What an error calls this component: never an address's user part or query."""
        if self.urls is not None:
            return "urls"
        return shown_url(str(self.function)) if self.is_service else str(self.function)

    @property
    def is_service(self) -> bool:
        """Whether it names addresses. What looks like one is one, so that a wrong one is refused without being quoted."""
        text = self.function.lower() if isinstance(self.function, str) else ""
        looks_so = text.startswith(("http:", "https:")) or ("://" in text and not text.startswith("model:"))
        return self.urls is not None or looks_so

    @property
    def addresses(self) -> list[str]:
        """Of a service; ConfigError for what is no address. It may hold a password, so it is not quoted."""
        given = self.urls if self.urls is not None else [str(self.function)]
        for url in given:
            if problem := address_problem(url):
                raise ConfigError(f"reward.functions: got an address {problem}, expected http://host:port/path")
        return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value))


# Of every field of an entry: what it may be, in code and in words.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "function": (lambda v: v is None or isinstance(v, str) or callable(v), "a function's name"),
    "urls": (
        lambda v: v is None or (isinstance(v, list) and bool(v) and all(isinstance(url, str) for url in v)),
        "a list of addresses",
    ),
    "weight": (
        lambda v: _is_number(v) and (v == 0 or 1e-30 <= abs(v) <= 1e30),
        "a number (0, or 1e-30 to 1e30 in size)",
    ),
    "timeout_seconds": (lambda v: _is_number(v) and 1e-3 <= v <= 1e8, "above 0 (a number of seconds, 0.001 to 1e+08)"),
    "name": (_is_text, "text"),
    "params": (
        lambda v: isinstance(v, dict) and all(isinstance(key, str) for key in v),
        "a mapping of names to values",
    ),
    "columns": (
        lambda v: (
            isinstance(v, dict)
            and all(isinstance(name, str) and name not in RESERVED for name in v)
            and all(isinstance(path, str) and path for path in v.values())
        ),
        "a mapping of arguments to columns, as {answer: reward_model.ground_truth}",
    ),
    "one_by_one": (lambda v: isinstance(v, bool), "true or false"),
    "batch_size": (
        lambda v: v is None or _is_whole(v, 1, 2**31 - 1),
        "at least 1 (a whole number) and at most 2147483647",
    ),
    "retries": (lambda v: _is_whole(v, 0, 1000), "at least 0 (a whole number) and at most 1000"),
    "outage_seconds": (
        lambda v: v is None or (_is_number(v) and 0 <= v <= 1e8),
        "at least 0 (a number of seconds) and at most 1e+08",
    ),
    "auth_env": (_is_text, "an environment variable's name"),
}


def parse_entries(value: Any, default_timeout: float) -> list[RewardEntry]:
    """One entry or a list of them, each a string, a mapping or (from Python) a function; None has none."""
    if value is None:
        return []
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [_parse_entry(entry, default_timeout) for entry in (value if several else [value])]


def _parse_entry(entry: Any, default_timeout: float) -> RewardEntry:
    if isinstance(entry, RewardEntry):
        return entry
    if isinstance(entry, str) or callable(entry):
        return RewardEntry(function=entry, timeout_seconds=default_timeout)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"reward.functions: got {entry!r}, expected a function's name or a mapping with `function`")
    known = list(RewardEntry.__dataclass_fields__)
    for key in entry:
        if key not in known:
            raise ConfigError(
                f"reward.functions: got key {key!r}, expected {', '.join(known)}{nearest(str(key), known)}"
            )
    given = {"timeout_seconds": default_timeout} | dict(entry)
    if given["timeout_seconds"] is None:
        given["timeout_seconds"] = default_timeout
    for key in ("params", "columns"):
        if given.get(key) is None:
            given[key] = {}
    return RewardEntry(**given)


def columns_problem(source: RewardSource, columns: Sequence[str], paths: Sequence[str], where: str) -> str | None:
    """What `source` needs of the data and does not find: `where` has `columns`, and `paths` inside them."""
    missing = source.missing_columns({*columns, *paths})
    if not missing:
        return None
    path = answer_path(columns, paths) if missing[0] == "answer" else None
    cure = f"set columns: {{{missing[0]}: {path or 'NAME'}}} in its entry"
    if isinstance(source, FunctionSource) and missing[0] in source.paths.values():
        near = nearest(missing[0], [*columns, *paths])
        cure = f"correct its `columns`{near}"
    elif not isinstance(source, FunctionSource) or source.is_users:
        cure += ", or params for a value that is the same for all rows"
    return (
        f"reward.functions {source.name}: needs {', '.join(map(repr, missing))}, {where} has columns "
        f"{', '.join(columns) or 'none'}; {cure}"
    )


def function_source(entry: RewardEntry) -> FunctionSource:
    """The source of an entry that names a Python function or a verifier. ConfigError if there is none of that name."""
    spec = entry.function
    if callable(spec):
        function, name = spec, getattr(spec, "__name__", type(spec).__name__)
    elif spec in VERIFIERS:
        function, name = VERIFIERS[str(spec)], str(spec)
    elif ":" not in str(spec) and "." not in str(spec):
        raise ConfigError(
            f"reward.functions: got {spec!r}, expected package.module:function, file.py:function or one of "
            f"{', '.join(VERIFIERS)}{nearest(str(spec), VERIFIERS)}"
        )
    else:
        try:
            function = load_function(str(spec))
        except DataError as error:
            raise ConfigError(f"reward.functions: {error}") from None
        except Exception as error:
            raise ConfigError(
                f"reward.functions: {spec} cannot be imported ({type(error).__name__}: {error})"
            ) from error
        name = str(spec).replace(":", ".").rpartition(".")[2]
    if spec in VERIFIERS:
        try:
            check_settings(str(spec), entry.params)
        except DataError as error:
            raise ConfigError(f"reward.functions {entry.name or name}: {error}") from None
    if spec in IN_A_PROCESS:
        from apportion.actors.reward_process import VerifierSource

        return VerifierSource(entry.name or name, name, entry)
    return FunctionSource(entry.name or name, function, entry)


class FunctionSource:
    """A Python function with TRL's signature, `f(prompts, completions, **columns) -> list`, sync or async.

    It is given what it names: `prompts`, `completions`, `prompt_ids`, `completion_ids`, columns, and all of them if it
    takes `**kwargs`; `params` of the entry go before columns of the same name, and so do its `columns`. Every call gets
    its own lists, so that a function may change them. A ready-made verifier gets the columns that it reads alone, and
    as `prompts` the text that each rendered prompt ends with. It runs in a thread, one call at a time;
    what needs a process's main thread (signals) fails there.

    Where a call of several samples raises or runs into its limit, it is repeated one sample at a time, so that only the
    samples at fault are lost; a function with effects elsewhere must bear being called again. The repetition has
    `timeout_seconds` once more for all samples together: an async function is repeated for all of them side by side, a
    plain one for one after the other, and each gets at most a quarter of what is left.
    """

    def __init__(self, name: str, function: Callable[..., Any], entry: RewardEntry) -> None:
        self.name, self.weight = name, entry.weight
        self._function, self.params, self.limit_seconds, self._one_by_one = (
            function,
            entry.params,
            entry.timeout_seconds,
            entry.one_by_one,
        )
        self.paths = entry.columns
        self.verifier = entry.function if entry.function in VERIFIERS else None
        self.is_users = self.verifier is None
        self._is_async = any(inspect.iscoroutinefunction(f) for f in (function, type(function).__call__))
        self._caller = LimitedCaller(name, self._is_async)
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._takes = {p.name for p in named}
        self._required = [p.name for p in named if p.default is p.empty]
        unknown = [key for key in entry.params if key not in self._takes]
        if unknown and not self._takes_all:
            near = nearest(unknown[0], self._takes)
            raise ConfigError(f"reward.functions {name}: got params key {unknown[0]!r}, the function has none{near}")
        if twice := [key for key in entry.columns if key in entry.params]:
            raise ConfigError(f"reward.functions {name}: got {twice[0]!r} in params and in columns, expected it in one")
        expected = self._takes if self.verifier is None else COLUMNS[self.verifier]
        unknown = [key for key in entry.columns if key not in expected]
        if unknown and (not self._takes_all or self.verifier is not None):
            raise ConfigError(
                f"reward.functions {name}: got columns key {unknown[0]!r}, expected an argument that the function reads "
                f"from the data: {', '.join(sorted(expected)) or 'it reads none'}{nearest(unknown[0], expected)}"
            )

    @property
    def hung(self) -> int:
        return self._caller.hung

    def close(self) -> None:
        self._caller.close()

    def missing_columns(self, columns: set[str]) -> list[str]:
        """Arguments without a default that neither a column nor `params` gives, and columns that are named and not there.
        `columns` may hold paths inside columns too."""
        lost = [path for path in self.paths.values() if path not in columns]
        given = {*columns, *self.params, *self.paths, *RESERVED}
        return [*(name for name in self._required if name not in given), *lost]

    def score(self, call: RewardCall) -> list[Any]:
        if self._one_by_one and len(call) > 1:
            return self._each(call)
        try:
            return self._asked(call, self.limit_seconds)
        except Exception as error:  # noqa: BLE001 - what a user's function raises is a failure of its samples
            if len(call) == 1 or isinstance(error, TooManyHung):
                return [failure_of(error, self.name)] * len(call)
        return self._each(call)  # out here, or each traceback would begin with this one

    def _asked(self, call: RewardCall, limit: float) -> list[Any]:
        return self._listed(self._caller.call(lambda: self._function(**self._arguments(call)), limit), len(call))

    def _arguments(self, call: RewardCall) -> dict[str, Any]:
        given = dict(call.with_columns(self.paths).columns)
        prompts = call.prompts
        if self.verifier is not None:
            given = {name: values for name, values in given.items() if name in COLUMNS[self.verifier]}
            prompts = call.prompts if call.prompt_endings is None else list(call.prompt_endings)
        given |= {"prompts": prompts, "completions": call.completions}
        given |= {"prompt_ids": call.prompt_ids, "completion_ids": call.completion_ids} | self.params
        if not self._takes_all:
            given = {name: value for name, value in given.items() if name in self._takes}
        return {name: own_copy(value) for name, value in given.items()}

    def _listed(self, elements: Any, expected: int) -> list[Any]:
        if hasattr(elements, "tolist"):  # numpy array, torch tensor
            elements = elements.tolist()
        if not isinstance(elements, list | tuple):
            text = f"{self.name}: got a {type(elements).__name__}, expected a list with one element a sample"
            return [Failure("wrong_type", text)] * expected
        if len(elements) != expected:
            text = f"{self.name}: got {len(elements)} rewards for {expected} completions"
            return [Failure("wrong_length", text)] * expected
        return list(elements)

    def _each(self, call: RewardCall) -> list[Any]:
        return self._side_by_side(call) if self._is_async else self._in_turn(call)

    def _in_turn(self, call: RewardCall) -> list[Any]:
        deadline = time.monotonic() + self.limit_seconds
        elements: list[Any] = []
        late = 0
        for index in range(len(call)):
            left = deadline - time.monotonic()
            if left <= 0 or late == HUNG_SAMPLES:
                elements.append(self.not_called(late))
                continue
            try:
                elements += self._asked(call.select([index]), left / 4)
            except Exception as error:  # noqa: BLE001 - as in `score`
                late += isinstance(error, CallTimeout)
                elements.append(failure_of(error, self.name))
        return elements

    def not_called(self, late: int) -> Failure:
        """Of a sample that no time is left for, after so many that took too long."""
        why = f"{late} samples before it took too long" if late else f"the {self.limit_seconds:g} s for all are over"
        return Failure("timeout", f"{self.name}: not called, as {why}")

    def _side_by_side(self, call: RewardCall) -> list[Any]:
        async def one(index: int) -> list[Any]:
            answer = self._function(**self._arguments(call.select([index])))
            return self._listed(await within(answer, self.limit_seconds, self.limit_seconds), 1)

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*map(one, range(len(call))), return_exceptions=True)

        try:
            answers = self._caller.call(all_of_them, self.limit_seconds + ASYNC_GRACE_SECONDS)
        except Exception as error:  # noqa: BLE001 - as in `score`
            return [failure_of(error, self.name)] * len(call)
        return [failure_of(a, self.name) if isinstance(a, BaseException) else a[0] for a in answers]
