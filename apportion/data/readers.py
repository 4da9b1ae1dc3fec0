"""Rows of files: jsonl, json, csv and parquet, the first three also as .gz. Each row knows its file and line.

A byte that is not UTF-8 spoils its own line of a jsonl or csv file, and a json file whole.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from apportion.data.errors import BadRows, DataError
from apportion.data.rows import Row


def read_file(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows of the file at `path`; the name's ending says how to read it."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if ending not in READERS:
        raise DataError(f"{path}: got a .{ending} file, expected {', '.join('.' + name for name in READERS)}")
    try:
        yield from READERS[ending](path, bad)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not readable as {ending} text in UTF-8 ({error})") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path}: got a damaged .gz file ({error}), expected one that unpacks; fetch it again"
        ) from None


def _open(path: Path, errors: str = "strict") -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors=errors, newline="")
    return path.open(encoding="utf-8-sig", errors=errors, newline="")


def _encoding_problem(text: str) -> str | None:
    """Of text read with `surrogateescape`, which leaves half a character where a byte is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not readable as text in UTF-8 (byte 0x{ord(text[error.start]) - 0xDC00:02x})"
    return None


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    blank: list[int] = []  # blank lines at the end of a file are no rows; between rows they are bad ones
    with _open(path, "surrogateescape") as file:
        for number, line in enumerate(file):
            place = f"{path}:{number + 1}"
            if not line.strip():
                blank.append(number + 1)
                continue
            for empty in blank:
                bad.reject("empty", f"{path}:{empty}: empty line, expected a JSON object")
            blank.clear()
            if problem := _encoding_problem(line):
                bad.reject("broken", f"{place}: {problem}")
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad.reject("broken", f"{place}: not valid JSON ({_json_problem(error)}): {line.strip()[:60]!r}")
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
        except UnicodeDecodeError:
            raise  # a ValueError too, which `read_file` words
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({_json_problem(error)})") from None
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
    with _open(path, "surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        header = _csv_header(path, reader)
        for number in itertools.count():
            first = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                # Each line of it counts: a quote that is never closed takes the rest of the file.
                for line in range(first, reader.line_num + 1):
                    bad.reject("broken", f"{path}:{line}: not valid csv ({error})")
                continue
            if cells is None:
                return
            place = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in cells):
                bad.reject("empty", f"{place}: empty row, expected {len(header)} columns")
            elif len(cells) != len(header):
                bad.reject("broken", f"{place}: got {len(cells)} columns, expected {len(header)}: {', '.join(header)}")
            elif problem := _encoding_problem("".join(cells)):
                bad.reject("broken", f"{place}: {problem}")
            else:
                yield Row(number, place, dict(zip(header, cells, strict=True)))


def _csv_header(path: Path, reader: Any) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}:1: not valid csv ({error})") from None
    if not any(header):
        raise DataError(f"{path}:1: no header line, expected column names")
    if problem := _encoding_problem("".join(header)):
        raise DataError(f"{path}:1: {problem}")
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{path}:1: got {count} columns named {name!r}, expected a name of its own for each; rename them"
        )
    return header


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
