"""Broken data files end in one line with the file, or give the rows that a reader of a few lines finds in them."""

import random
import shutil
import time

import pytest
from fuzz import Hang, at_most, cases, data_files

from apportion.data.errors import DataError, UnusableError
from apportion.data.messages import clean_messages
from apportion.data.pairs import PairColumns, read_demonstration, read_pair
from apportion.data.sources import load_sources


def loaded(path, policy):
    """(rows by number, None), or (None, the error's line)."""
    try:
        with at_most(30):
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
    for seed in cases(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = data_files.make(random.Random(seed), folder)
        strict, line = loaded(path, "error")
        skipping, none_line = loaded(path, "skip")
        try:
            plain = data_files.plain_rows(path)
        except data_files.Unreadable:
            assert strict is None and skipping is None, f"seed {seed}: {path} is damaged"
            outcomes["none"] += 1
            continue
        finally:
            if seed >= 60:
                shutil.rmtree(folder)
        rows = skipping or {}
        assert all(plain.get(number) == row for number, row in rows.items()), f"seed {seed}"
        if none_line is None or "no row can be used" in none_line:
            missing = [number for number, row in plain.items() if sure(row) and number not in rows]
            assert not missing, f"seed {seed}: rows {missing} of {path}"
        assert strict is None or strict == rows, f"seed {seed}"
        outcomes["all" if line is None else "some" if rows else "none"] += 1
    assert min(outcomes.values()) > 0, outcomes  # the generator makes each kind


def test_odd_messages():
    """Whatever a row has in the place of messages is cleaned or refused in one line."""
    kept = 0
    for seed in cases(300):
        rng = random.Random(seed)
        keys = ["role", "content", "from", "value", "tool_calls", "function_call", "weight", "reasoning", "x"]
        message = {key: odd(rng, 3) for key in rng.sample(keys, rng.randrange(1, 5))}
        message = {"role": rng.choice(["user", "assistant", "tool"]), "content": "hi", **message}
        try:
            [cleaned] = clean_messages([message])
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            kept += 1
            assert isinstance(cleaned["content"], str) and isinstance(cleaned["role"], str)
        row = {name: odd(rng, 3) for name in rng.sample(COLUMNS, 4)} | {rng.choice(COLUMNS): [message]}
        for read in (read_pair, read_demonstration):
            try:
                read(row, PairColumns())
            except UnusableError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
    assert kept


COLUMNS = ["prompt", "chosen", "rejected", "completion", "messages", "conversations", "label", "system", "tools"]


def odd(rng, depth):
    kind = rng.randrange(8) if depth else 0
    if kind == 1:
        return [odd(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 2:
        names = ["type", "text", "function", "name", "arguments", "thinking"]
        return {name: odd(rng, depth - 1) for name in rng.sample(names, rng.randrange(4))}
    return rng.choice([*data_files.ODD, "text", "thinking", "f", "user"])
