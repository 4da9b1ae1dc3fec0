"""Rows of files: jsonl, json, csv and parquet, the first three also as .gz. Each row knows its file and line.

A byte that is not UTF-8 spoils its own line of a jsonl or csv file, its own row of a parquet file, and a json file whole.
So does a row of more than `LARGEST_ROW` characters. A .gz or parquet file that is damaged is an error in any case: which
rows are missing is not known.
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

from apportion.data.arrow import read_parquet
from apportion.data.errors import BadRows, DataError, listed
from apportion.data.rows import LARGEST_ROW, Row, check_names, size_problem

LARGEST_TEXT = 2**30  # characters of a .json file, which is read whole, and of a line that is skipped
_CHUNK = 2**20


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


class _Lines:
    """Iterate over the lines of a file. A line that is too long for a row comes without its content and sets `too_long`, which
    the reader resets."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path, self.number, self.too_long = file, path, 0, False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(LARGEST_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) <= LARGEST_ROW or line.endswith("\n"):
            return line
        self.too_long = True
        size, quotes = len(line), line.count('"')
        while not line.endswith(("\n", "\r")) and (line := self._file.readline(_CHUNK)):
            size, quotes = size + len(line), quotes + line.count('"')
            if size > LARGEST_TEXT:
                raise DataError(f"{self._path}:{self.number}: got a line of more than {LARGEST_TEXT:,} characters")
        return '"\n' if quotes % 2 else "\n"  # whether a quoted csv cell is open stays as it is


def _too_large(place: str) -> tuple[str, str]:
    return "too_large", f"{place}: got a line of more than {LARGEST_ROW:,} characters; split it, or leave it out"


class _Json:
    """A JSON parser that notices an object with a key twice, of which Python's own keeps the last value."""

    def __init__(self) -> None:
        self._twice: dict[int, str] = {}  # objects of the last text by id, each with that key
        self._kept: list[dict[str, Any]] = []  # an id is unique as long as its object lives
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def parse(self, text: str) -> Any:
        self._twice.clear()
        self._kept.clear()
        return self._decoder.decode(text)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self._twice[id(made)] = Counter(name for name, _ in pairs).most_common(1)[0][0]
            self._kept.append(made)
        return made

    def problem(self, row: Any) -> str | None:
        """What is wrong with a row of the last text that has such an object in it."""
        waiting = [row] if self._twice else []
        while waiting:
            value = waiting.pop()
            if id(value) in self._twice:
                return f"got the key {self._twice[id(value)]!r:.60} twice, expected a name of its own for each"
            waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return None


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    blank: list[int] = []  # blank lines at the end of a file are no rows; between rows they are bad ones
    with _open(path, "surrogateescape") as file:
        lines, parser = _Lines(file, path), _Json()
        for number, line in enumerate(lines):
            place = f"{path}:{number + 1}"
            if not line.strip() and not lines.too_long:
                blank.append(number + 1)
                continue
            for empty in blank:
                bad.reject("empty", f"{path}:{empty}: empty line, expected a JSON object")
            blank.clear()
            if lines.too_long:
                lines.too_long = False
                bad.reject(*_too_large(place))
            elif problem := _encoding_problem(line):
                bad.reject("broken", f"{place}: {problem}")
            else:
                values = _json_line(line, parser, place, bad)
                if values is not None:
                    yield Row(number, place, values)


def _json_line(line: str, parser: _Json, place: str, bad: BadRows) -> dict[str, Any] | None:
    """The object of a line; None for a bad row."""
    try:
        values = parser.parse(line)
    except (ValueError, RecursionError) as error:
        bad.reject("broken", f"{place}: not valid JSON ({_json_problem(error)}): {line.strip()[:60]!r}")
        return None
    if not isinstance(values, dict):
        bad.reject("broken", f"{place}: got a JSON {type(values).__name__}, expected an object with columns")
    elif not values:
        bad.reject("empty", f"{place}: empty row, expected a JSON object with columns")
    elif problem := parser.problem(values):
        bad.reject("broken", f"{place}: {problem}")
    else:
        return values
    return None


def _read_json(path: Path, bad: BadRows) -> Iterator[Row]:
    with _open(path) as file:
        text = file.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise DataError(
            f"{path}: got more than {LARGEST_TEXT:,} characters, which are read whole, expected fewer; make it a .jsonl "
            "file, which is read line by line"
        )
    parser = _Json()
    try:
        rows = parser.parse(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs into a .jsonl file" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({_json_problem(error)})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: got a JSON {type(rows).__name__}, expected a list of objects")
    may_be_large = len(text) > LARGEST_ROW
    for number, values in enumerate(rows):
        place = f"{path}: row {number + 1}"
        if not isinstance(values, dict) or not values:
            bad.reject("empty" if not values else "broken", f"{place}: got {str(values)[:60]!r}, expected an object")
        elif problem := parser.problem(values):
            bad.reject("broken", f"{place}: {problem}")
        elif may_be_large and (large := size_problem(values)):
            bad.reject(large[0], f"{place}: {large[1]}")
        else:
            yield Row(number, place, values)


def _read_csv(path: Path, bad: BadRows) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW)  # of the whole process; the default refuses long prompts
    with _open(path, "surrogateescape") as file:
        lines = _Lines(file, path)
        reader = csv.reader(lines, strict=True)
        header = _csv_header(path, reader)
        for number in itertools.count():
            first, lines.too_long = reader.line_num + 1, False
            try:
                cells = next(reader, None)
            except csv.Error as error:
                # Each line of it counts: a quote that is never closed takes the rest of the file.
                last = reader.line_num
                if "field limit" in str(error):
                    last += sum(1 for _ in lines)
                for line in range(first, last + 1):
                    bad.reject("broken", f"{path}:{line}: not valid csv ({error})")
                continue
            if cells is None:
                return
            place = f"{path}:{reader.line_num}"
            if lines.too_long:
                bad.reject(*_too_large(place))
            elif not any(cell.strip() for cell in cells):
                bad.reject("empty", f"{place}: empty row, expected {len(header)} columns")
            elif len(cells) != len(header):
                bad.reject("broken", f"{place}: got {len(cells)} columns, expected {len(header)}: {listed(header)}")
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
    check_names(f"{path}:1", header)
    return header


READERS: dict[str, Callable[[Path, BadRows], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": read_parquet,
}
