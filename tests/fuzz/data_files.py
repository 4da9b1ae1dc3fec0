"""Data files with damage in them, and what a reader of a few lines finds in the same bytes."""

import csv
import gzip
import io
import itertools
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

FORMATS = ("jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz", "parquet", "saved") * 3 + ("splits", "unknown")
UNKNOWN = ("rows.tsv", "rows.txt", "rows.arrow", "rows.jsonl.zst", "rows.json.bz2", "rows", "rows.gz", "rows.JSONL.xz")
ODD = ("", "  ", "é😀", "\ud83d", "null", "a\nb", 'say "1"', "x,y", "\0", 5, -1.5, 10**25, None, True, [], {}, [1], {"a": [2]})  # fmt: skip
PIECES = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b"\xff", b"\x00", b"\\", b'"prompt":1,', b"null", b"\xef\xbb\xbf", b"9" * 5000)  # fmt: skip


def a_row(rng: random.Random, flat: bool) -> dict[str, Any]:
    """A row as people write it; `flat` ones hold text and numbers alone."""
    prompt: Any = f"What is {rng.randrange(100)} + {rng.randrange(100)}?"
    if not flat and rng.random() < 0.3:
        prompt = [{"role": "user", "content": prompt}]
    row = {"prompt": prompt, "answer": rng.randrange(100), "note": "é" * rng.randrange(3)}
    if not flat:
        row["extra"] = {"tags": ["a"] * rng.randrange(3)}
    return row


def spoil_row(rng: random.Random, row: dict[str, Any]) -> Any:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(ODD)
    if kind == 1:
        return {**row, "prompt": rng.choice(ODD)}
    if kind == 2:
        message = {"role": rng.choice(["user", "wizard", 5, None, ""]), "content": rng.choice(ODD)}
        return {**row, "prompt": [message, rng.choice(ODD)] if rng.random() < 0.3 else [message]}
    return {key: value for key, value in row.items() if key != rng.choice(list(row))}


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(5)
    place = rng.randrange(len(data) + 1)
    if kind == 0:
        return data
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + rng.choice(PIECES) + data[place:]
    if kind == 3:
        return data[:place] + data[place + rng.randrange(1, 30) :]
    spoilt = bytearray(data)
    for _ in range(min(len(data), rng.randrange(1, 6))):
        spoilt[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(spoilt)


def make(rng: random.Random, folder: Path) -> Path:
    """A file, or a saved dataset's folder, that may be broken anywhere."""
    form = rng.choice(FORMATS)
    flat = form.startswith("csv")
    rows: list[Any] = [a_row(rng, flat) for _ in range(rng.randrange(1, 40))]
    if form in ("parquet", "saved", "splits"):
        return _make_arrow(rng, folder, form, rows)
    if form == "unknown":
        path = folder / rng.choice(UNKNOWN)
        path.write_bytes(spoil_bytes(rng, _written("jsonl", rows)))
        return path
    if rng.random() < 0.5:
        at = rng.randrange(len(rows))
        rows[at] = spoil_row(rng, rows[at])
    data = _written(form, rows)
    before = form.endswith(".gz") and rng.random() < 0.5  # damage within or around what is packed
    data = spoil_bytes(rng, data) if before or not form.endswith(".gz") else data
    if form.endswith(".gz"):
        data = gzip.compress(data) if before else spoil_bytes(rng, gzip.compress(data))
    path = folder / f"rows.{form}"
    path.write_bytes(data)
    return path


def _written(form: str, rows: list[Any]) -> bytes:
    if form.startswith("jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form.startswith("json"):
        return json.dumps(rows, indent=1).encode()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["prompt", "answer", "note"])
    for row in rows:
        writer.writerow(row.values() if isinstance(row, dict) else [row])
    return text.getvalue().encode(errors="surrogateescape" if "\ud83d" not in text.getvalue() else "replace")


def _make_arrow(rng: random.Random, folder: Path, form: str, rows: list[Any]) -> Path:
    rows = [{**row, "prompt": str(row["prompt"])} for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    kind = rng.randrange(4)
    if kind == 0:  # text that is not UTF-8
        texts = [row["prompt"].encode() for row in rows]
        texts[rng.randrange(len(rows))] += b"\xff"
        binary = pyarrow.array(texts, pyarrow.binary())
        text = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), binary.buffers())
        table = table.set_column(0, "prompt", text)
    elif kind == 1:  # a time that Python has no form for
        times = [0] * len(rows)
        times[rng.randrange(len(rows))] = 2**60
        table = table.append_column("when", pyarrow.array(times, pyarrow.timestamp("us")))
    elif kind == 2 and form == "parquet":
        table = table.append_column("answer", table.column("answer"))
    if form == "parquet":
        path = folder / "rows.parquet"
        packing = rng.choice(["snappy", "gzip", "zstd", "brotli", "none"])
        pyarrow.parquet.write_table(table, path, compression=packing, row_group_size=rng.randrange(5, 40))
        if kind == 3:
            path.write_bytes(spoil_bytes(rng, path.read_bytes()))
        return path
    if form == "saved":
        return _make_saved(rng, folder / "saved", table, broken=kind == 3)
    path = folder / "saved"
    _make_saved(rng, path / "train", table, broken=kind == 3)
    splits = rng.choice(ODD) if rng.random() < 0.1 else {"splits": rng.choice(ODD) if rng.random() < 0.1 else ["train"]}
    (path / "dataset_dict.json").write_text(json.dumps(splits))
    return path


def _make_saved(rng: random.Random, path: Path, table: pyarrow.Table, broken: bool) -> Path:
    """One split in one file or two."""
    path.mkdir(parents=True)
    at = rng.choice((len(table), rng.randrange(len(table) + 1)))
    files = {"data.arrow": table.slice(0, at)} | ({"more.arrow": table.slice(at)} if at < len(table) else {})
    for name, part in files.items():
        with pyarrow.OSFile(str(path / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part)
    state: Any = {
        "_data_files": [{"filename": name} for name in files], "_fingerprint": "a", "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    info: Any = {"citation": "", "description": ""}
    if broken and rng.random() < 0.5:
        state = rng.choice([state, rng.choice(ODD), {**state, rng.choice(list(state)): rng.choice(ODD)}])
        info = rng.choice([info, rng.choice(ODD), {**info, "features": rng.choice(ODD)}])
    elif broken:
        file = path / rng.choice(sorted(files))
        file.write_bytes(spoil_bytes(rng, file.read_bytes()))
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path


# --- a reader of a few lines ---


class Unreadable(Exception):
    """The whole file cannot be read."""


def plain_rows(path: Path) -> dict[int, Any]:
    """Rows by number that can be read, whatever is in them. Unreadable for a file that is damaged as a whole."""
    if path.name in UNKNOWN:
        raise Unreadable
    if path.name == "rows.parquet" or path.is_dir():
        return _arrow_rows(path)
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise Unreadable from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    if ".jsonl" in path.name:
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        return {number: row for number, line in enumerate(lines) if (row := _json(line)) is not None}
    if ".json" in path.name:
        rows = _json(data, whole=True)
        if not isinstance(rows, list):
            raise Unreadable
        return {number: row for number, row in enumerate(rows) if "TWICE" not in str(row)}
    return _csv_rows(data)


def _json(data: bytes, whole: bool = False) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> Any:
        if len({name for name, _ in found}) == len(found):
            return dict(found)
        if whole:
            return "TWICE"
        raise ValueError

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return None


def _csv_rows(data: bytes) -> dict[int, Any]:
    """After a row that is not csv the next line begins one."""
    reader = csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""), strict=True)
    rows: dict[int, Any] = {}
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise Unreadable from error
    if len(set(names)) < len(names) or any("\udc80" <= c <= "\udcff" for c in "".join(names)):
        raise Unreadable
    for number in itertools.count():
        try:
            cells = next(reader, None)
        except csv.Error:
            continue
        if cells is None:
            return rows
        if len(cells) == len(names) and not any("\udc80" <= c <= "\udcff" for c in "".join(cells)):
            rows[number] = dict(zip(names, cells, strict=True))
    return rows


def _arrow_rows(path: Path) -> dict[int, Any]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())
        if not isinstance(splits, dict) or splits.get("splits") != ["train"]:
            raise Unreadable
        path = path / "train"
    try:
        if path.is_dir():
            tables = []
            for name in ("data.arrow", "more.arrow"):
                if (path / name).is_file():
                    with pyarrow.OSFile(str(path / name), "rb") as source:
                        tables.append(pyarrow.ipc.open_stream(source).read_all())
            table = pyarrow.concat_tables(tables)
            table.validate()
        else:
            table = pyarrow.parquet.ParquetFile(path).read()
        if len(set(table.column_names)) < len(table.column_names):
            raise Unreadable
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Unreadable from error
    rows = {}
    for number in range(len(table)):
        try:
            rows[number] = table.slice(number, 1).to_pylist()[0]
        except (ValueError, ArithmeticError):
            continue
    return rows
