"""Sources of rows: files, Hugging Face datasets, reasoning-gym tasks, a user's function, built-in sums.

A source is written as a string or as a mapping with `source` and what is known of it:

    my.jsonl                          {source: my.parquet, weight: 2, limit: 1000, prompt_column: question}
    hf:openai/gsm8k:train             {source: "hf:openai/gsm8k", config: main, split: test}
    a folder written by save_to_disk  {source: folder, split: train}
    gym:chain_sum                     {source: "gym:chain_sum", size: 5000, seed: 3, max_terms: 4}
    function:my.module:rows           {source: "function:my.module:rows", level: 2}
    arithmetic                        {source: arithmetic, high: 99}

Keys that no source shares (`max_terms`, `level`) are the source's own parameters. Rows are checked when they are loaded
(broken, empty, without a prompt); a prompt's length in tokens is checked when it is drawn.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from apportion.data.digest import digest_rows
from apportion.data.errors import BadRows, DataError, nearest
from apportion.data.functions import load_function
from apportion.data.hub import load_hub, load_saved, saved_by_datasets
from apportion.data.readers import read_file
from apportion.data.rows import EXPECTED, Row, RowCheck, SourceSpec, check_whole, prompt_problem, size_problem
from apportion.data.tasks import EVAL_SEED_OFFSET, Arithmetic, GymRows

SPLITS = ("train", "eval")


@dataclass
class Source:
    """Rows ready to become prompts."""

    name: str  # unique among the sources loaded together
    rows: Sequence[Row]
    weight: float = 1.0
    prompt_column: str = "prompt"
    skipped: Counter[str] = field(default_factory=Counter)  # rows left out while loading, by reason

    @cached_property
    def digest(self) -> int:
        """Of the rows as they were loaded: order, prompt and all columns."""
        return digest_rows(self.rows, self.prompt_column)


def parse_specs(value: Any, limit: int | None = None) -> list[SourceSpec]:
    """One spec or a list of them, each a string or a mapping; `limit` holds where a spec has none.

    >>> specs = parse_specs(["a.csv", {"source": "gym:gcd", "weight": 3, "size": 9}])
    >>> [(s.source, s.weight, s.parameters) for s in specs]
    [('a.csv', 1.0, {}), ('gym:gcd', 3, {'size': 9})]
    """
    entries = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(entries, Sequence) or not entries:
        raise DataError(f"data: got {value!r}, expected one or more sources: {EXPECTED}")
    return [_parse_spec(entry, limit) for entry in entries]


def _parse_spec(entry: Any, limit: int | None) -> SourceSpec:
    if isinstance(entry, str):
        return SourceSpec(entry, limit=limit)
    if not isinstance(entry, Mapping) or "source" not in entry:
        raise DataError(f"data: got {entry!r}, expected a string or a mapping with a key `source`: {EXPECTED}")
    shared = {f.name for f in fields(SourceSpec)} - {"parameters"}
    known = {key: value for key, value in entry.items() if key in shared}
    known.setdefault("limit", limit)
    return SourceSpec(**known, parameters={str(k): v for k, v in entry.items() if k not in shared})


def load_sources(
    value: Any,
    *,
    split: str = "train",
    prompt_column: str = "prompt",
    on_bad_row: str = "error",
    limit: int | None = None,
    check: RowCheck = prompt_problem,
) -> list[Source]:
    """Every source that `value` (a spec or a list of specs) names.

    `split` ("train" or "eval") is what sources that know both sides of a split give; a spec's own `split` goes first.
    DataError with file and line where a row is bad (`check` says which are), unless `on_bad_row` is "skip": then
    `skipped` counts them.
    """
    if split not in SPLITS:
        raise DataError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    sources: list[Source] = []
    for spec in parse_specs(value, limit):
        bad = BadRows(on_bad_row)
        made_here = spec.source.startswith("gym:") or spec.source == "arithmetic"
        column = spec.prompt_column or ("prompt" if made_here else prompt_column)
        rows = _load(spec, split, column, bad, check)
        if not rows:
            raise DataError(
                f"{spec.source}: no row can be used; left out: {dict(bad.counts) or 'none, the source is empty'}"
            )
        name = _unique(spec.name or _short_name(spec.source), {s.name for s in sources})
        sources.append(Source(name, rows, float(spec.weight), column, bad.counts))
    return sources


def _load(spec: SourceSpec, split: str, column: str, bad: BadRows, check: RowCheck) -> Sequence[Row]:
    kind, _, rest = spec.source.partition(":")
    if spec.source == "arithmetic":
        return _arithmetic(spec, split)
    if kind == "gym":
        return _gym(spec, rest, split)
    if kind == "hf":
        return load_hub(spec, rest, split, column, bad, check)
    if kind == "function":
        rows = _function_rows(spec, rest, bad)
        return list(islice(_checked(rows, column, bad, check), spec.limit))
    path = Path(spec.source).expanduser()
    if saved_by_datasets(path):
        return load_saved(spec, path, split, column, bad, check)
    if not path.is_file():
        known = nearest(spec.source, ["arithmetic", "gym:", "hf:", "function:"])
        raise DataError(f"{spec.source}: no such file or saved dataset{known}; expected {EXPECTED}")
    if spec.parameters:
        shared = [f.name for f in fields(SourceSpec) if f.name != "parameters"]
        first = next(iter(spec.parameters))
        raise DataError(f"{spec.source}: got {first!r}, a file has no such parameter{nearest(first, shared)}")
    return list(islice(_checked(read_file(path, bad), column, bad, check), spec.limit))


def _arithmetic(spec: SourceSpec, split: str) -> list[Row]:
    known = [f.name for f in fields(Arithmetic)]
    for name, value in spec.parameters.items():
        if name not in known:
            raise DataError(f"arithmetic: got {name!r}, expected {', '.join(known)}{nearest(name, known)}")
        check_whole("arithmetic", name, value)
    side = _one_of_splits(spec, split)
    return Arithmetic(**spec.parameters).rows(side)[: spec.limit]


def _gym(spec: SourceSpec, task: str, split: str) -> Sequence[Row]:
    parameters = dict(spec.parameters)
    size = parameters.pop("size", 1000)
    seed = parameters.pop("seed", 0 if _one_of_splits(spec, split) == "train" else EVAL_SEED_OFFSET)
    check_whole(spec.source, "size", size, least=1)
    check_whole(spec.source, "seed", seed)
    return GymRows(task, size if spec.limit is None else min(size, spec.limit), seed, parameters)


def _one_of_splits(spec: SourceSpec, split: str) -> str:
    if spec.split is not None and spec.split not in SPLITS:
        raise DataError(f"{spec.source}: got split {spec.split!r}, expected one of {', '.join(SPLITS)}")
    return spec.split or split


def _function_rows(spec: SourceSpec, name: str, bad: BadRows) -> Iterable[Row]:
    """Rows that the user's function yields; an endless one needs a `limit`."""
    for number, values in enumerate(_yielded(spec, name)):
        place = f"{spec.source}: row {number + 1}"
        if not isinstance(values, Mapping):
            bad.reject("broken", f"{place}: got a {type(values).__name__}, expected a mapping of columns")
        elif not values:
            bad.reject("empty", f"{place}: empty row, expected a mapping of columns")
        elif not all(isinstance(key, str) for key in values):
            odd = next(key for key in values if not isinstance(key, str))
            bad.reject("broken", f"{place}: got a column named {odd!r:.40}, expected text")
        elif problem := size_problem(values):
            bad.reject(problem[0], f"{place}: {problem[1]}")
        else:
            yield Row(number, place, dict(values))


def _yielded(spec: SourceSpec, name: str) -> Iterable[Any]:
    function = load_function(name)
    _check_arguments(spec, function)
    try:
        rows = function(**spec.parameters)
        if isinstance(rows, str | bytes | Mapping) or not (isinstance(rows, Iterable) or hasattr(rows, "__getitem__")):
            raise DataError(
                f"{spec.source}: the function returns a {type(rows).__name__}, expected rows: a list of mappings, or a "
                "function that yields them"
            )
        yield from rows
    except SystemExit as error:  # it would end this process, with its own exit code
        raise DataError(f"{spec.source}: the function calls sys.exit({error.code!r}), expected it to return") from None


def _check_arguments(spec: SourceSpec, function: Callable[..., Any]) -> None:
    """DataError where the function does not take the source's parameters."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions in C it is not known
        return
    try:
        signature.bind(**spec.parameters)
    except TypeError as error:
        raise DataError(
            f"{spec.source}: got parameters {', '.join(spec.parameters) or 'none'}, expected {signature} ({error})"
        ) from None


def _checked(rows: Iterable[Row], column: str, bad: BadRows, check: RowCheck) -> Iterable[Row]:
    for row in rows:
        problem = check(row.values, column)
        if problem is None:
            yield row
        else:
            bad.reject(problem[0], f"{row.place}: {problem[1]}")


def _short_name(source: str) -> str:
    if source.partition(":")[0] in ("hf", "gym", "function") or source == "arithmetic":
        return source
    return Path(source).name.removesuffix(".gz").partition(".")[0] or source


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or `name#2`, `name#3`... where it is taken: prompt ids begin with it."""
    count = 2
    unique = name
    while unique in taken:
        unique, count = f"{name}#{count}", count + 1
    return unique
