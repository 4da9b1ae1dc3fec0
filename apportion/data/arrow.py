"""Rows of Arrow data as Python values. Damage is found row by row, or ends in one line with the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apportion.data.errors import BadRows, DataError
from apportion.data.rows import Row, check_names, size_problem

BATCH = 1000  # rows read at a time: compressed text may unpack to a hundred thousand times its size
# What Arrow raises for a value that has no Python form: text that is not UTF-8, a date out of range, an unknown time
# zone, two fields of one name.
UNREADABLE = (ValueError, ArithmeticError, LookupError)


def read_parquet(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows of a parquet file. A value that cannot be read spoils its own row, a damaged page or footer the file."""
    import pyarrow.parquet

    number = 0
    file = _opened(path)
    check_names(str(path), file.schema_arrow.names)
    with file:
        batches = file.iter_batches(BATCH)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the system: a disk that fails
                    raise
                raise DataError(
                    f"{path}: not readable as parquet after row {number} ({first_line(error)}): the file is damaged; "
                    "fetch it again"
                ) from None
            if batch is None:
                return
            for values in python_rows(batch):
                number += 1
                place = f"{path}: row {number}"
                if isinstance(values, str):
                    bad.reject("broken", f"{place}: {values}")
                elif all(value is None for value in values.values()):
                    bad.reject("empty", f"{place}: empty row, every column is null")
                elif problem := size_problem(values):
                    bad.reject(problem[0], f"{place}: {problem[1]}")
                else:
                    yield Row(number - 1, place, values)


def python_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Each row of a record batch, or what is wrong with it."""
    try:
        rows = batch.to_pylist()
    except UNREADABLE:
        names = batch.schema.names
        for number in range(batch.num_rows):
            yield _python_row(batch.slice(number, 1), names)
    else:
        yield from rows


def _python_row(batch: Any, names: list[str]) -> dict[str, Any] | str:
    values = {}
    for place, name in enumerate(names):
        try:
            values[name] = batch.column(place)[0].as_py()
        except UNREADABLE as error:
            return f"column {name!r:.60}: {value_problem(error, str(batch.schema.field(place).type))}"
    return values


def value_problem(error: Exception, kind: str) -> str:
    """What is wrong with a value of the type `kind`."""
    if isinstance(error, UnicodeDecodeError):
        return f"not readable as text in UTF-8 (byte 0x{error.object[error.start]:02x})"
    return f"not readable as {kind:.40} ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _opened(path: Path) -> Any:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        file.schema_arrow.names  # noqa: B018 - names that are not UTF-8 are found here
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: not a parquet file ({first_line(error)})") from None
    return file
