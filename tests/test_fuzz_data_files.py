"""Broken data files end in one line with the file, or give the rows that a reader of a few lines finds in them."""

import random
import re
import shutil
import time

import pytest
from fuzz import Hang, at_most, cases, data_files, try_all

from apportion.data.errors import DataError, UnusableError
from apportion.data.messages import clean_messages
from apportion.data.pairs import PairColumns, read_demonstration, read_pair
from apportion.data.sources import load_sources


def loaded(path, policy):
    """(rows by number, None), or (None, the error's line)."""
    try:
        [source] = load_sources(str(path), on_bad_row=policy)
        return {row.number: dict(row.values) for row in source.rows}, None
    except DataError as error:
        said = str(error)
        assert "\n" not in said and said.startswith(str(path)) and len(said) < 1000, said
        return None, said


def sure(row):
    """Whether the row gives a prompt beyond doubt."""
    return isinstance(row, dict) and isinstance(row.get("prompt"), str) and bool(row["prompt"].strip())


def test_a_hang_is_not_taken_for_a_refusal(monkeypatch, tmp_path):
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", lambda *_, **__: time.sleep(30))
    with pytest.raises(Hang, match="still busy after 1 s"), at_most(1):
        load_sources(str(path))


def test_broken_data_files(tmp_path):
    outcomes = {"all": 0, "some": 0, "none": 0}

    def case(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = data_files.make(random.Random(number), folder)
        try:
            outcome = as_a_plain_reader(path)
        except AssertionError as error:
            return f"{path.name}: {error}"
        outcomes[outcome] += 1
        shutil.rmtree(folder)
        return None

    try_all("data files", 60, case)
    if len(cases(60)) >= 60:
        assert min(outcomes.values()) > 0, outcomes  # the generator makes each kind


def as_a_plain_reader(path):
    """Check that what is loaded is what a reader of a few lines finds; how much of it can be loaded."""
    strict, line = loaded(path, "error")
    skipping, none_line = loaded(path, "skip")
    try:
        plain = data_files.plain_rows(path)
    except data_files.Unreadable:
        assert strict is None and skipping is None, "it is damaged, and rows of it are accepted"
        return "none"
    rows = skipping or {}
    wrong = [number for number, row in rows.items() if plain.get(number) != row]
    assert not wrong, f"rows {wrong} differ from what is in the file"
    if none_line is None or "no row can be used" in none_line:
        missing = [number for number, row in plain.items() if sure(row) and number not in rows]
        assert not missing, f"rows {missing} are lost"
    assert strict is None or strict == rows, "error and skip give different rows"
    if line is not None and rows:  # one row is at fault, and the line says which
        assert re.match(rf"{re.escape(str(path))}(:\d+|: row \d+): ", line), line
    return "all" if line is None else "some" if rows else "none"


def test_odd_messages():
    """Whatever a row has in the place of messages is cleaned or refused in one line."""
    kept = 0

    def case(number):
        nonlocal kept
        rng = random.Random(number)
        keys = ["role", "content", "from", "value", "tool_calls", "function_call", "weight", "reasoning", "x"]
        message = {key: odd(rng, 3) for key in rng.sample(keys, rng.randrange(1, 5))}
        message = {"role": rng.choice(["user", "assistant", "tool"]), "content": "hi", **message}
        try:
            [cleaned] = clean_messages([message])
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        else:
            kept += 1
            assert isinstance(cleaned["content"], str) and isinstance(cleaned["role"], str)
        row = {name: odd(rng, 3) for name in rng.sample(COLUMNS, 4)} | {rng.choice(COLUMNS): [message]}
        for read in (read_pair, read_demonstration):
            try:
                read(row, PairColumns())
            except UnusableError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, str(error)

    try_all("rows of messages", 300, case)
    assert kept or len(cases(300)) < 300


COLUMNS = ["prompt", "chosen", "rejected", "completion", "messages", "conversations", "label", "system", "tools"]


def odd(rng, depth):
    kind = rng.randrange(8) if depth else 0
    if kind == 1:
        return [odd(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 2:
        names = ["type", "text", "function", "name", "arguments", "thinking"]
        return {name: odd(rng, depth - 1) for name in rng.sample(names, rng.randrange(4))}
    return rng.choice([*data_files.ODD, "text", "thinking", "f", "user"])
