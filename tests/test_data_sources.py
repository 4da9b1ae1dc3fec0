"""Sources of rows: what is read, what is refused and how it is said, and what is counted when skipping."""

import gzip
import json
import math
from pathlib import Path

import pytest

from apportion.data.errors import DataError
from apportion.data.sources import load_sources, parse_specs


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def refusal(value, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_sources(value, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ROWS = [{"prompt": "1 + 1?", "answer": 2, "tags": ["a"]}, {"prompt": "2 + 2?", "answer": 4, "tags": []}]


def test_jsonl_rows_keep_their_columns_and_types(tmp_path):
    path = write_lines(tmp_path / "sums.jsonl", *map(json.dumps, ROWS))
    [source] = load_sources(str(path))
    assert source.name == "sums"
    assert [row.values for row in source.rows] == ROWS
    assert [row.place for row in source.rows] == [f"{path}:1", f"{path}:2"]


def test_gzipped_jsonl_and_json_lists_give_the_same_rows(tmp_path):
    with gzip.open(tmp_path / "sums.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    first, second = load_sources([str(tmp_path / "sums.jsonl.gz"), str(tmp_path / "list.json")])
    assert [row.values for row in first.rows] == [row.values for row in second.rows] == ROWS
    assert (first.name, second.name) == ("sums", "list")


def test_csv_cells_are_text_and_quoted_cells_may_hold_line_ends(tmp_path):
    path = write_lines(tmp_path / "sums.csv", "question,answer", '"1 +\n1?",2', "2 + 2?,4")
    [source] = load_sources(str(path), prompt_column="question")
    assert [row.values for row in source.rows] == [
        {"question": "1 +\n1?", "answer": "2"},
        {"question": "2 + 2?", "answer": "4"},
    ]
    assert source.rows[1].place == f"{path}:4"


def test_parquet_rows_keep_their_columns_and_types(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "sums.parquet")
    [source] = load_sources(str(tmp_path / "sums.parquet"))
    assert [row.values for row in source.rows] == ROWS


def test_a_broken_json_line_is_named_with_file_and_line(tmp_path):
    path = write_lines(tmp_path / "sums.jsonl", json.dumps(ROWS[0]), '{"prompt": "2 +')
    message = refusal(str(path))
    assert message.startswith(f"{path}:2: not valid JSON (")
    assert '\'{"prompt": "2 +\'' in message


def test_a_missing_column_is_named_with_what_the_row_has(tmp_path):
    path = write_lines(tmp_path / "sums.jsonl", json.dumps({"question": "1 + 1?", "answer": 2}))
    assert refusal(str(path)) == (
        f"{path}:1: no column 'prompt', got question, answer; name the right one with prompt_column"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "empty row, expected a JSON object with columns"),
        ("[1]", "got a JSON list, expected an object with columns"),
        ('{"prompt": "  "}', "column 'prompt' is empty, expected text or messages"),
        ('{"prompt": []}', "column 'prompt' is empty, expected text or messages"),
        ('{"prompt": 7}', "column 'prompt': got a int, expected text or a list of messages"),
        ('{"prompt": [{"text": "hi"}]}', "column 'prompt': got message \"{'text': 'hi'}\", expected role and content"),
        (
            '{"prompt": [{"role": "assistant", "content": "hi"}]}',
            "column 'prompt': the last message is the assistant's, expected one that asks for an answer",
        ),
    ],
)
def test_a_row_without_a_usable_prompt_is_refused_in_one_line(tmp_path, line, message):
    path = write_lines(tmp_path / "rows.jsonl", line)
    assert refusal(str(path)) == f"{path}:1: {message}"


def test_an_empty_line_between_rows_is_bad_and_at_the_end_is_nothing(tmp_path):
    rows = list(map(json.dumps, ROWS))
    path = write_lines(tmp_path / "rows.jsonl", rows[0], "", rows[1], "", "")
    assert refusal(str(path)) == f"{path}:2: empty line, expected a JSON object"
    [source] = load_sources(str(path), on_bad_row="skip")
    assert source.skipped == {"empty": 1}


def test_skipping_counts_bad_rows_by_reason_and_keeps_row_numbers(tmp_path):
    good = json.dumps(ROWS[0])
    path = write_lines(tmp_path / "rows.jsonl", "{", good, '{"question": "x"}', '{"prompt": ""}', "[]", good)
    [source] = load_sources(str(path), on_bad_row="skip")
    assert source.skipped == {"broken": 2, "missing_column": 1, "empty": 1}
    assert [row.number for row in source.rows] == [1, 5]


def test_a_source_without_a_usable_row_is_refused_even_when_skipping(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", "{", "[]")
    assert refusal(str(path), on_bad_row="skip") == f"{path}: no row can be used; left out: {{'broken': 2}}"
    empty = write_lines(tmp_path / "empty.jsonl")
    assert refusal(str(empty)) == f"{empty}: no row can be used; left out: none, the source is empty"


def test_csv_rows_of_the_wrong_width_are_named_with_their_line(tmp_path):
    path = write_lines(tmp_path / "rows.csv", "prompt,answer", "1 + 1?,2", "2 + 2?")
    assert refusal(str(path)) == f"{path}:3: got 1 columns, expected 2: prompt, answer"


def test_files_that_are_not_what_their_name_says_are_refused_in_one_line(tmp_path):
    for name in ("rows.parquet", "rows.jsonl", "rows.jsonl.gz"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00garbage")
    assert "not a parquet file" in refusal(str(tmp_path / "rows.parquet"))
    assert refusal(str(tmp_path / "rows.jsonl")).endswith("rows.jsonl:1: not readable as text in UTF-8 (byte 0xff)")
    assert "rows.jsonl.gz: got a damaged .gz file (" in refusal(str(tmp_path / "rows.jsonl.gz"))
    (tmp_path / "rows.json").write_bytes(b'[{"prompt": "\xff"}]')
    assert "not readable as json text in UTF-8" in refusal(str(tmp_path / "rows.json"), on_bad_row="skip")
    (tmp_path / "rows.txt").write_text("hello")
    assert refusal(str(tmp_path / "rows.txt")).endswith("got a .txt file, expected .jsonl, .json, .csv, .parquet")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "\xe9t\xe9?"}', "not readable as text in UTF-8 (byte 0xe9)"),
        (b'{"prompt": ' + b"7" * 5000 + b"}", "not valid JSON (a number of too many digits): "),
        (b"[" * 100_000, "not valid JSON (nested too deep): "),
    ],
    ids=["bytes", "digits", "nested"],
)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_line_that_cannot_be_read_is_bad_alone(tmp_path, line, problem, ending):
    rows = [json.dumps(row).encode() for row in ROWS]
    path = tmp_path / f"rows.{ending}"
    content = b"\n".join([rows[0], line, rows[1]])
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert refusal(str(path)).startswith(f"{path}:2: {problem}")
    [source] = load_sources(str(path), on_bad_row="skip")
    assert source.skipped == {"broken": 1}
    assert [(row.number, row.values) for row in source.rows] == [(0, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("7" * 5000, "a number of too many digits"), ("[" * 100_000, "nested too deep")],
    ids=["digits", "nested"],
)
def test_a_json_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, text, problem):
    (tmp_path / "rows.json").write_text(text)
    assert refusal(str(tmp_path / "rows.json"), on_bad_row="skip").endswith(f"rows.json: not valid JSON ({problem})")


@pytest.mark.parametrize("row", [b'"1 + 1?"x,2', b"1 + 1?\xff,2"])
def test_a_csv_row_that_cannot_be_read_is_bad_alone(tmp_path, row):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\n".join([b"prompt,answer", b"0 + 0?,0", row, b"2 + 2?,4", b""]))
    assert refusal(str(path)).startswith(f"{path}:3: not ")
    [source] = load_sources(str(path), on_bad_row="skip")
    assert source.skipped == {"broken": 1}
    assert [(row.number, row.values["answer"]) for row in source.rows] == [(0, "0"), (2, "4")]


def test_every_line_that_an_open_quote_takes_with_it_is_counted(tmp_path):
    path = write_lines(tmp_path / "rows.csv", "prompt,answer", "0 + 0?,0", '"1 + 1?,2', "2 + 2?,4", "3 + 3?,6")
    assert refusal(str(path)) == f"{path}:3: not valid csv (unexpected end of data)"
    [source] = load_sources(str(path), on_bad_row="skip")
    assert (len(source.rows), source.skipped) == (1, {"broken": 3})


def test_a_csv_header_that_names_a_column_twice_is_refused_and_named(tmp_path):
    path = write_lines(tmp_path / "rows.csv", "prompt,answer,prompt", "1 + 1?,2,hm")
    assert refusal(str(path), on_bad_row="skip") == (
        f"{path}:1: got 2 columns named 'prompt', expected a name of its own for each; rename them"
    )


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    content = b"\xef\xbb\xbfprompt,answer\n1 + 1?,2\n"
    (tmp_path / "rows.csv").write_bytes(content)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(content))
    for source in load_sources([str(tmp_path / "rows.csv"), str(tmp_path / "rows.csv.gz")]):
        assert [row.values for row in source.rows] == [{"prompt": "1 + 1?", "answer": "2"}]


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-20],
        lambda whole: whole[:20] + b"\xff" * 40 + whole[60:],
        lambda whole: whole[:-8] + b"0" * 8,
    ],
    ids=["cut", "garbled", "checksum"],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_damaged_gz_file_is_refused_by_name(tmp_path, damage, ending):
    path = tmp_path / f"rows.{ending}.gz"
    path.write_bytes(damage(gzip.compress("\n".join(str(i) for i in range(5000)).encode())))
    assert refusal(str(path), on_bad_row="skip").startswith(f"{path}: got a damaged .gz file (")


def write_parquet(path, table, **options):
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd", "brotli"])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_damaged_parquet_file_is_refused_with_the_row_up_to_which_it_is_read(tmp_path, compression, policy):
    import pyarrow.parquet

    table = pyarrow.table({"prompt": [f"{i} + {i}?" * 20 for i in range(3000)]})
    path = write_parquet(tmp_path / "rows.parquet", table, compression=compression, row_group_size=1500)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + 300] = b"\xff" * 300
    path.write_bytes(bytes(data))
    message = refusal(str(path), on_bad_row=policy)
    assert message.startswith(f"{path}: not readable as parquet after row 1000 (")
    assert message.endswith("): the file is damaged; fetch it again")
    path.write_bytes(data[: len(data) // 2])
    assert refusal(str(path), on_bad_row=policy).startswith(f"{path}: not a parquet file (")


def text_with_bad_bytes(count, bad):
    """Arrow text of which one row is not UTF-8."""
    import pyarrow

    texts = [f"{i} + {i}?".encode() + (b"\xe9" if i == bad else b"") for i in range(count)]
    return pyarrow.Array.from_buffers(pyarrow.string(), count, pyarrow.array(texts, pyarrow.binary()).buffers())


def test_parquet_values_that_python_cannot_hold_spoil_their_own_rows(tmp_path):
    import pyarrow

    when = pyarrow.array([0, 0, 0, 2**60], pyarrow.timestamp("us"))
    table = pyarrow.table({"prompt": text_with_bad_bytes(4, 1), "when": when})
    path = write_parquet(tmp_path / "rows.parquet", table)
    assert refusal(str(path)) == f"{path}: row 2: column 'prompt': not readable as text in UTF-8 (byte 0xe9)"
    [source] = load_sources(str(path), on_bad_row="skip")
    assert source.skipped == {"broken": 2}
    assert [(row.number, row.values["prompt"]) for row in source.rows] == [(0, "0 + 0?"), (2, "2 + 2?")]
    path = write_parquet(tmp_path / "times.parquet", table.slice(2))
    assert refusal(str(path)) == (
        f"{path}: row 2: column 'when': not readable as timestamp[us] (date value out of range)"
    )


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("row", "key"), [('{"prompt": "a?", "prompt": "b?"}', "prompt"), ('{"prompt": "a?", "x": [{"k": 1, "k": 1}]}', "k")]
)
def test_a_key_twice_in_an_object_makes_a_bad_row(tmp_path, ending, row, key):
    rows = [json.dumps(ROWS[0]), row, json.dumps(ROWS[1])]
    path = tmp_path / f"rows.{ending}"
    path.write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
    place = f"{path}:2" if ending == "jsonl" else f"{path}: row 2"
    assert refusal(str(path)) == f"{place}: got the key {key!r} twice, expected a name of its own for each"
    [source] = load_sources(str(path), on_bad_row="skip")
    assert ([row.values for row in source.rows], source.skipped) == (ROWS, {"broken": 1})


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    import pyarrow

    table = pyarrow.table([["a?"], ["b?"]], names=["prompt", "prompt"])
    path = write_parquet(tmp_path / "rows.parquet", table)
    assert refusal(str(path), on_bad_row="skip") == (
        f"{path}: got 2 columns named 'prompt', expected a name of its own for each; rename them"
    )


@pytest.mark.parametrize("ending", ["jsonl", "csv", "json"])
def test_a_line_of_hundreds_of_megabytes_in_a_small_gz_is_a_bad_row(tmp_path, ending):
    path = tmp_path / f"rows.{ending}.gz"
    long = "a" * (2**25 + 5)
    rows = [{"prompt": "1 + 1?"}, {"prompt": long}, {"prompt": "2 + 2?"}]
    texts = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "csv": f'prompt\n1 + 1?\n"{long}"\n2 + 2?\n',
        "json": json.dumps(rows),
    }
    path.write_bytes(gzip.compress(texts[ending].encode(), 1))
    assert "has more than 33,554,432 characters" in refusal(str(path)).replace("got a line of", "has")
    [source] = load_sources(str(path), on_bad_row="skip")
    assert source.skipped == {"too_large": 1}
    assert [row.values["prompt"] for row in source.rows] == ["1 + 1?", "2 + 2?"]


def test_a_column_name_of_thousands_of_letters_or_of_two_lines_stays_out_of_the_message(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", json.dumps({"x" * 5000: 1, "a\nb": 2}))
    message = refusal(str(path))
    assert message.startswith(f"{path}:1: no column 'prompt', got 'xxxx") and len(message) < 300
    assert "'a\\nb'" in message


def test_a_missing_file_and_a_misspelt_source_are_told_what_is_expected():
    assert refusal("nowhere.jsonl").startswith("nowhere.jsonl: no such file or saved dataset; expected a .jsonl")
    assert "(did you mean 'arithmetic'?)" in refusal("arithmetik")
    assert "(did you mean 'chain_sum'?)" in refusal("gym:chain_sums")
    assert refusal({"sauce": "a.jsonl"}).startswith("data: got {'sauce': 'a.jsonl'}, expected a string or a mapping")


def test_a_misspelt_key_of_a_file_is_refused_with_the_nearest_name(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", json.dumps(ROWS[0]))
    assert refusal({"source": str(path), "wieght": 2}).endswith(
        "got 'wieght', a file has no such parameter (did you mean 'weight'?)"
    )


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan, "much", True])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    assert refusal({"source": "arithmetic", "weight": weight}).startswith(f"arithmetic: got weight {weight!r}")


@pytest.mark.parametrize(
    ("source", "key", "value", "expected"),
    [
        ("arithmetic", "limit", "ten", "a whole number of at least 1"),
        ("arithmetic", "limit", 1.5, "a whole number of at least 1"),
        ("arithmetic", "limit", True, "a whole number of at least 1"),
        ("rows.jsonl", "limit", 0, "a whole number of at least 1"),
        ("rows.jsonl", "name", 7, "text"),
        ("rows.jsonl", "split", 7, "text"),
        ("rows.jsonl", "prompt_column", ["a"], "text"),
        ("gym:gcd", "size", "x", "a whole number of at least 1"),
        ("gym:gcd", "size", 2.5, "a whole number of at least 1"),
        ("gym:gcd", "seed", "x", "a whole number"),
        ("arithmetic", "high", True, "a whole number"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_with_what_was_got_and_expected(source, key, value, expected):
    assert refusal({"source": source, key: value}) == f"{source}: got {key} {value!r}, expected {expected}"


def test_a_gym_size_of_the_wrong_kind_is_refused_beside_a_limit_too():
    assert refusal({"source": "gym:gcd", "size": "x", "limit": 2}).startswith("gym:gcd: got size 'x', expected")


def test_limits_come_from_the_run_unless_the_source_has_its_own(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *[json.dumps({"prompt": f"{i}?"}) for i in range(9)])
    sources = load_sources([str(path), {"source": str(path), "limit": 2, "name": "few"}], limit=4)
    assert [(s.name, len(s.rows)) for s in sources] == [("rows", 4), ("few", 2)]


def test_sources_of_one_name_get_numbers_so_that_prompt_ids_stay_unique():
    sources = load_sources(["arithmetic", "arithmetic", {"source": "arithmetic", "name": "sums"}])
    assert [s.name for s in sources] == ["arithmetic", "arithmetic#2", "sums"]


def test_specs_keep_what_belongs_to_the_source_itself():
    [spec] = parse_specs({"source": "gym:gcd", "weight": 3, "size": 9, "min_numbers": 2}, limit=5)
    assert (spec.weight, spec.limit, spec.parameters) == (3, 5, {"size": 9, "min_numbers": 2})


def pairs(split: str, **parameters) -> list[tuple[int, int]]:
    [source] = load_sources({"source": "arithmetic", **parameters}, split=split)
    return [(row.values["a"], row.values["b"]) for row in source.rows]


def test_arithmetic_asks_every_sum_once_and_train_and_eval_share_none_not_even_mirrored():
    train, held_out = pairs("train"), pairs("eval")
    assert (len(train), len(held_out)) == (800, 100)
    assert sorted(train + held_out) == [(a, b) for a in range(1, 31) for b in range(1, 31)]
    assert not set(train) & {(b, a) for a, b in held_out}
    assert pairs("train") == train
    assert set(pairs("eval", seed=1)) != set(held_out)


def test_arithmetic_rows_are_worded_as_documented():
    [source] = load_sources("arithmetic", prompt_column="question")
    row = source.rows[0].values
    assert row["prompt"] == f"What is {row['a']} + {row['b']}? Answer with a number."
    assert row["answer"] == str(row["a"] + row["b"])
    assert source.prompt_column == "prompt"


def test_arithmetic_parameters_are_checked():
    assert refusal({"source": "arithmetic", "hihg": 9}).endswith(
        "got 'hihg', expected low, high, eval_pairs, seed (did you mean 'high'?)"
    )
    assert refusal({"source": "arithmetic", "high": 5}).startswith("arithmetic: got eval_pairs=100 of 25 pairs")


def test_gym_tasks_give_prompt_answer_and_the_whole_entry():
    [source] = load_sources({"source": "gym:chain_sum", "size": 5, "seed": 1, "max_terms": 3})
    values = source.rows[0].values
    assert len(source.rows) == 5
    assert values["prompt"] == values["entry"]["question"]
    assert values["answer"] == values["entry"]["answer"] == str(eval(values["entry"]["metadata"]["expression"]))
    assert (values["task"], values["task_parameters"]) == ("chain_sum", {"max_terms": 3})
    assert all(row.values["entry"]["metadata"]["num_terms"] <= 3 for row in source.rows)


def test_gym_eval_questions_are_others_than_the_training_ones():
    [train], [held_out] = (load_sources({"source": "gym:gcd", "size": 50}, split=s) for s in ("train", "eval"))
    assert not {r.values["prompt"] for r in train.rows} & {r.values["prompt"] for r in held_out.rows}


def test_gym_parameters_that_the_task_refuses_are_a_data_error():
    assert refusal({"source": "gym:chain_sum", "max_trems": 3}).startswith(
        "gym:chain_sum: parameters {'max_trems': 3} refused ("
    )


def test_a_python_function_yields_rows_with_its_parameters(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "import itertools\n\n"
        "def squares(start):\n"
        "    for n in itertools.count(start):\n"
        "        yield {'prompt': f'{n}^2?', 'answer': n * n}\n"
    )
    monkeypatch.chdir(tmp_path)
    [source] = load_sources({"source": "function:my_rows.py:squares", "start": 3, "limit": 2})
    assert [row.values for row in source.rows] == [{"prompt": "3^2?", "answer": 9}, {"prompt": "4^2?", "answer": 16}]
    assert "has no 'square' (did you mean 'squares'?)" in refusal("function:my_rows.py:square")
    assert "no file" in refusal("function:other.py:squares")
    assert "no module 'not_there'" in refusal("function:not_there:rows")


def test_a_module_or_function_that_leaves_the_process_is_refused_in_one_line(tmp_path):
    script, leaving = tmp_path / "script.py", tmp_path / "leaving.py"
    script.write_text("import sys\ndef rows():\n    yield {'prompt': '1 + 1?'}\nsys.exit(0)\n")
    leaving.write_text("import sys\ndef rows():\n    yield {'prompt': '1 + 1?'}\n    sys.exit(4)\n")
    with pytest.raises(
        DataError, match=r"script\.py:rows: importing .*script\.py calls sys\.exit\(0\), expected a module"
    ):
        load_sources(f"function:{script}:rows")
    with pytest.raises(DataError, match=r"leaving\.py:rows: the function calls sys\.exit\(4\), expected it to return$"):
        load_sources(f"function:{leaving}:rows")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    return None", "the function returns a NoneType, expected rows: a list of mappings"),
        ("    [{'prompt': 'a?'}]", "the function returns a NoneType, expected rows: a list of mappings"),
        ("    return 5", "the function returns a int, expected rows: a list of mappings"),
        ("    return {'prompt': 'a?'}", "the function returns a dict, expected rows: a list of mappings"),
        ("    return 'rows.jsonl'", "the function returns a str, expected rows: a list of mappings"),
        ("    yield {5: 'a?'}", "row 1: got a column named 5, expected text"),
    ],
)
def test_a_rows_function_that_gives_no_rows_is_refused(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"def rows():\n{body}\n")
    source = f"function:{tmp_path}/mine.py:rows"
    assert refusal(source).startswith(f"{source}: {said}")


def test_parameters_that_a_rows_function_does_not_take_are_refused_and_its_own_errors_keep_their_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("def rows(level=1):\n    raise TypeError('mine')\n")
    source = f"function:{tmp_path}/mine.py:rows"
    assert refusal({"source": source, "levle": 2}) == (
        f"{source}: got parameters levle, expected (level=1) (got an unexpected keyword argument 'levle')"
    )
    with pytest.raises(TypeError, match=r"^mine$"):
        load_sources(source)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("state.json", "[]", "state.json: got a JSON list, expected an object"),
        ("state.json", "null", "state.json: got a JSON NoneType, expected an object"),
        ("state.json", "[" * 5000, "state.json: not valid JSON ("),
        ("state.json", '{"_data_files": 5}', "state.json: got _data_files 5, expected names of files beside it"),
        ("state.json", '{"_data_files": [{"filename": "../a"}]}', "expected names of files beside it"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "not readable as a saved dataset ("),
        ("dataset_info.json", "[]", "dataset_info.json: got a JSON list, expected an object"),
        ("dataset_info.json", '{"features": 5}', "not readable as a saved dataset (TypeError: "),
        ("dataset_dict.json", '{"splits": 5}', "dataset_dict.json: got splits 5, expected names of folders beside it"),
        ("dataset_dict.json", '{"splits": ["../other"]}', "expected names of folders beside it"),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_damaged_saved_dataset_is_refused_in_one_line(tmp_path, file, text, said, policy):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / file).write_text(text)
    message = refusal(str(tmp_path / "saved"), on_bad_row=policy)
    assert message.startswith(f"{tmp_path}/saved") and said in message


def test_rows_of_a_saved_dataset_that_python_cannot_hold_are_bad_and_damaged_places_end_the_reading(tmp_path):
    import datasets
    import pyarrow

    when = pyarrow.array([0, 0, 0, 2**60], pyarrow.timestamp("us"))
    table = pyarrow.table({"prompt": text_with_bad_bytes(4, 1), "when": when})
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "a", "when": 0}]).save_to_disk(str(folder))
    (folder / "dataset_info.json").write_text("{}")
    [file] = folder.glob("*.arrow")
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert refusal(str(folder)) == f"{folder}: row 2: not readable as text in UTF-8"
    [source] = load_sources(str(folder), on_bad_row="skip")
    assert source.skipped == {"broken": 2}
    assert [(row.number, row.values["prompt"]) for row in source.rows] == [(0, "0 + 0?"), (2, "2 + 2?")]
    data = file.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 6, 13))
    assert offsets in data
    file.write_bytes(data.replace(offsets, offsets[:4] + b"\xff\xff\x00\x00" + offsets[8:]))
    assert refusal(str(folder), on_bad_row="skip").startswith(f"{folder}: damaged in rows 1 to 4 (")


def test_saved_datasets_are_read_by_split_and_checked(tmp_path, monkeypatch):
    import datasets

    train = datasets.Dataset.from_list([*ROWS, {"prompt": "", "answer": 0, "tags": []}])
    held_out = datasets.Dataset.from_list([{"prompt": "3 + 3?", "answer": 6, "tags": ["b"]}])
    datasets.DatasetDict({"train": train, "test": held_out}).save_to_disk(str(tmp_path / "both"))
    folder = str(tmp_path / "both")
    assert refusal(folder) == f"{folder}: row 3: column 'prompt' is empty, expected text or messages"
    [source] = load_sources(folder, on_bad_row="skip")
    assert ([row.values for row in source.rows], source.skipped) == (ROWS, {"empty": 1})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"hf:{folder}", "hf:~/both", "~/both"):
        [evaluation] = load_sources(name, split="eval")
        assert [row.values["answer"] for row in evaluation.rows] == [6]
    assert "got splits train, test, expected dev" in refusal({"source": folder, "split": "dev"})
    assert "no column 'question', got prompt, answer, tags" in refusal(folder, prompt_column="question")
