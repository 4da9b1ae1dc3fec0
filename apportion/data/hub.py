"""Hugging Face datasets, by hub name or from a folder that `save_to_disk` wrote. Rows stay in their Arrow files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from apportion.data.arrow import UNREADABLE, first_line
from apportion.data.errors import BadRows, DataError, nearest
from apportion.data.rows import Row, RowCheck, SourceSpec, prompt_problem, size_problem

# What an eval source takes where neither the spec nor the name says a split, in this order.
DEFAULT_SPLITS = {"train": ("train",), "eval": ("test", "validation", "eval")}
PORTION = 1000  # rows read at a time
# What `datasets` raises for damaged files; it reads their JSON without looking at its types.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


class TableRows(Sequence[Row]):
    """Rows of a datasets.Dataset, read when asked for."""

    def __init__(self, table: Any, numbers: Sequence[int], place: str) -> None:
        self._table, self._numbers, self._place = table, numbers, place

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self._numbers[index]
        return Row(number, f"{self._place}: row {number + 1}", self._table[number])

    def only(self, names: Collection[str]) -> TableRows:
        """The same rows with these columns alone, which are read without the others."""
        kept = [name for name in self._table.column_names if name in names]
        return TableRows(self._table.select_columns(kept), self._numbers, self._place)

    def at(self, places: Sequence[int]) -> TableRows:
        """The rows at these places."""
        return TableRows(self._table, [self._numbers[place] for place in places], self._place)

    def __iter__(self) -> Iterator[Row]:
        """In portions: one row at a time costs Arrow many times as much."""
        for start in range(0, len(self._numbers), PORTION):
            numbers = list(self._numbers[start : start + PORTION])
            columns = self._table[numbers]
            for place, number in enumerate(numbers):
                values = {name: column[place] for name, column in columns.items()}
                yield Row(number, f"{self._place}: row {number + 1}", values)


def saved_by_datasets(path: Path) -> bool:
    """Whether `path` is a folder written by Dataset.save_to_disk or DatasetDict.save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_saved(
    spec: SourceSpec, path: Path, split: str, column: str, bad: BadRows, check: RowCheck = prompt_problem
) -> Sequence[Row]:
    """Rows of a folder; one that holds several splits gives `spec.split`, else train, or test for eval."""
    import datasets

    if spec.parameters:
        raise DataError(f"{spec.source}: got {next(iter(spec.parameters))!r}, a saved dataset has no such parameter")
    _check_saved(path)
    try:
        saved = datasets.load_from_disk(str(path))
    except _DAMAGED as error:
        raise DataError(
            f"{spec.source}: not readable as a saved dataset ({type(error).__name__}: {first_line(error)}); save it again"
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[_choose_split(spec, split, list(saved))]
    return _rows(saved, spec, column, bad, check)


def load_hub(
    spec: SourceSpec, name: str, split: str, column: str, bad: BadRows, check: RowCheck = prompt_problem
) -> Sequence[Row]:
    """Rows of `NAME[:SPLIT]` on the hub (or a local folder of that name); `config` names a configuration of it."""
    name, _, named_split = name.partition(":")
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    if saved_by_datasets(Path(name)):
        return load_saved(_with_split(spec, named_split), Path(name), split, column, bad, check)
    import datasets

    unknown = [key for key in spec.parameters if key not in ("config", "revision")]
    if unknown:
        near = nearest(unknown[0], ["config", "revision"])
        raise DataError(f"{spec.source}: got {unknown[0]!r}, expected config or revision{near}")
    config, revision = (spec.parameters.get(key) for key in ("config", "revision"))
    try:
        chosen = named_split or spec.split
        if chosen is None:
            chosen = _choose_split(spec, split, datasets.get_dataset_split_names(name, config, revision=revision))
        table = datasets.load_dataset(name, config, split=chosen, revision=revision)
    except DataError:
        raise
    except (*_DAMAGED, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{spec.source}: could not be loaded ({type(error).__name__}: {first_line(error)})") from None
    return _rows(table, spec, column, bad, check)


def _with_split(spec: SourceSpec, split: str) -> SourceSpec:
    return replace(spec, split=split or spec.split)


def _choose_split(spec: SourceSpec, split: str, found: list[str]) -> str:
    wanted = (spec.split,) if spec.split else DEFAULT_SPLITS[split]
    for name in wanted:
        if name in found:
            return name
    raise DataError(
        f"{spec.source}: got splits {', '.join(found)}, expected {' or '.join(wanted)}; say which with `split`"
    )


def _rows(table: Any, spec: SourceSpec, column: str, bad: BadRows, check: RowCheck) -> Sequence[Row]:
    one_column = check is prompt_problem  # a check of another kind may look at every column
    if one_column and column not in table.column_names:
        missing = prompt_problem(dict.fromkeys(table.column_names), column)
        raise DataError(f"{spec.source}: {missing[1] if missing else ''}")
    numbers: list[int] = []
    table = table.with_format(None)  # rows of Python values, whatever the dataset was saved with
    names = [
        n for n in table.column_names if not one_column or n == column or _may_fail(table.features.arrow_schema, n)
    ]
    for number, values in enumerate(_values(table, names, spec.source)):
        problem = ("broken", values) if isinstance(values, str) else size_problem(values) or check(values, column)
        if problem is None:
            numbers.append(number)
        else:
            bad.reject(problem[0], f"{spec.source}: row {number + 1}: {problem[1]}")
        if len(numbers) == spec.limit:
            break
    return TableRows(table, numbers, spec.source)


def _values(table: Any, names: list[str], source: str) -> Iterator[dict[str, Any] | str]:
    """Each row's values of these columns, or what is wrong with any of its columns."""
    chosen = table.select_columns(names)
    for start in range(0, len(table), PORTION):
        stop = min(start + PORTION, len(table))
        if _invalid(table, start, stop, source) is None:
            try:
                columns = chosen[start:stop]
            except UNREADABLE:
                pass
            else:
                for place in range(stop - start):
                    yield {name: column[place] for name, column in columns.items()}
                continue
        for number in range(start, stop):
            try:
                yield _invalid(table, number, number + 1, source) or chosen[number]
            except UNREADABLE as error:
                yield f"not readable ({first_line(error)})"


def _invalid(table: Any, start: int, stop: int, source: str) -> str | None:
    """Whether these rows hold text that is not UTF-8. DataError where Arrow's own numbers are damaged, which say where a
    text begins: the rows around it may read well and be wrong."""
    import pyarrow

    try:
        table.data.slice(start, stop - start).validate(full=True)
    except pyarrow.ArrowException as error:
        if "UTF8" not in str(error):
            raise DataError(
                f"{source}: damaged in rows {start + 1} to {stop} ({first_line(error)}); fetch or save it again"
            ) from None
        return "not readable as text in UTF-8"
    return None


def _may_fail(schema: Any, name: str) -> bool:
    """Whether the column has values without a Python form that Arrow itself takes: a date out of range."""
    import pyarrow

    waiting = [schema.field(name).type]
    while waiting:
        kind = waiting.pop()
        if pyarrow.types.is_temporal(kind):
            return True
        if pyarrow.types.is_nested(kind):
            waiting += [kind.field(place).type for place in range(kind.num_fields)]
    return False


def _check_saved(path: Path) -> None:
    """DataError for a saved dataset whose own files do not have the form that `datasets` writes, or lead out of it."""
    whole = path / "dataset_dict.json"
    parts = [path]
    if whole.is_file():
        splits = _mapping(whole).get("splits")
        if not isinstance(splits, list) or not splits or not all(_is_name(name) for name in splits):
            raise DataError(
                f"{whole}: got splits {str(splits)[:60]}, expected names of folders beside it; save it again"
            )
        parts = [path / name for name in splits]
    for part in parts:
        for file in (part / "state.json", part / "dataset_info.json"):
            if not file.is_file():
                raise DataError(f"{file}: no such file, expected a dataset that is saved whole; save it again")
        files = _mapping(part / "state.json").get("_data_files")
        names = (
            [entry.get("filename") if isinstance(entry, dict) else None for entry in files]
            if isinstance(files, list)
            else []
        )
        if not names or not all(_is_name(name) for name in names):
            raise DataError(
                f"{part / 'state.json'}: got _data_files {str(files)[:60]}, expected names of files beside it; save it again"
            )
        _mapping(part / "dataset_info.json")


def _mapping(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({first_line(error)}); save the dataset again") from None
    if not isinstance(read, dict):
        raise DataError(f"{file}: got a JSON {type(read).__name__}, expected an object; save the dataset again")
    return read


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name
