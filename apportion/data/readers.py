"""Rows of files: jsonl, json, csv and parquet, the first three also as .gz. Each row knows its file and line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from apportion.data.errors import BadRows, DataError
from apportion.data.rows import Row


def read_file(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows of the file at `path`; the name's ending says how to read it."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if ending not in READERS:
        raise DataError(f"{path}: got a .{ending} file, expected {', '.join('.' + name for name in READERS)}")
    try:
        yield from READERS[ending](path, bad)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not readable as {ending} text in UTF-8 ({error})") from None


def _open(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    blank: list[int] = []  # blank lines at the end of a file are no rows; between rows they are bad ones
    with _open(path) as file:
        for number, line in enumerate(file):
            place = f"{path}:{number + 1}"
            if not line.strip():
                blank.append(number + 1)
                continue
            for empty in blank:
                bad.reject("empty", f"{path}:{empty}: empty line, expected a JSON object")
            blank.clear()
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                shown = line.strip()[:60]
                bad.reject("broken", f"{place}: not valid JSON ({error.msg} at column {error.colno}): {shown!r}")
                continue
            if isinstance(values, dict) and values:
                yield Row(number, place, values)
            elif isinstance(values, dict):
                bad.reject("empty", f"{place}: empty row, expected a JSON object with columns")
            else:
                bad.reject("broken", f"{place}: got a JSON {type(values).__name__}, expected an object with columns")


def _read_json(path: Path, bad: BadRows) -> Iterator[Row]:
    with _open(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            hint = "; one object a line belongs into a .jsonl file" if error.msg == "Extra data" else ""
            raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}){hint}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: got a JSON {type(rows).__name__}, expected a list of objects")
    for number, values in enumerate(rows):
        place = f"{path}: row {number + 1}"
        if isinstance(values, dict) and values:
            yield Row(number, place, values)
        else:
            bad.reject("empty" if not values else "broken", f"{place}: got {str(values)[:60]!r}, expected an object")


def _read_csv(path: Path, bad: BadRows) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default refuses long prompts
    with _open(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if header is None or not any(header):
                raise DataError(f"{path}:1: no header line, expected column names")
            for number, cells in enumerate(reader):
                place = f"{path}:{reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    bad.reject("empty", f"{place}: empty row, expected {len(header)} columns")
                elif len(cells) != len(header):
                    bad.reject(
                        "broken", f"{place}: got {len(cells)} columns, expected {len(header)}: {', '.join(header)}"
                    )
                else:
                    yield Row(number, place, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid csv ({error})") from None


def _read_parquet(path: Path, bad: BadRows) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    number = 0
    with file:
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                place = f"{path}: row {number + 1}"
                if all(value is None for value in values.values()):
                    bad.reject("empty", f"{place}: empty row, every column is null")
                else:
                    yield Row(number, place, values)
                number += 1


READERS: dict[str, Callable[[Path, BadRows], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
