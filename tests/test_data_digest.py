"""A resumed run compares a digest of its rows: any other row, column or order is seen, and equal rows are equal."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from apportion.data import digest
from apportion.data.digest import digest_arrays, digest_rows
from apportion.data.errors import DataError
from apportion.data.pair_tokens import ExampleEncoder, encode_sources, pack
from apportion.data.pairs import PairColumns, read_pair, row_check
from apportion.data.prompts import PromptEncoder, PromptStream, load_tokenizer
from apportion.data.rows import Row
from apportion.data.sources import Source, load_sources

ROWS = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 2?", "answer": "4"}, {"prompt": "3 + 3?", "answer": "6"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny")


def rows_of(values) -> list[Row]:
    return [Row(i, f"x:{i + 1}", v) for i, v in enumerate(values)]


def stream(tokenizer, *values, **options) -> PromptStream:
    sources = [Source(f"s{i}", rows_of(v)) for i, v in enumerate(values)]
    return PromptStream(sources, PromptEncoder(tokenizer, **options), 2)


OTHERS = {
    "a prompt": [{**ROWS[0], "prompt": "1 + 2?"}, *ROWS[1:]],
    "an answer": [{**ROWS[0], "answer": "3"}, *ROWS[1:]],
    "the kind of an answer": [{**ROWS[0], "answer": 2}, *ROWS[1:]],
    "another column": [{**ROWS[0], "level": None}, *ROWS[1:]],
    "the order": [ROWS[1], ROWS[0], ROWS[2]],
    "the last row": [*ROWS[:2], {**ROWS[2], "answer": "7"}],
}


@pytest.mark.parametrize("changed", OTHERS)
def test_as_many_other_rows_are_refused_by_the_sources_name(tokenizer, changed):
    state = json.loads(json.dumps(stream(tokenizer, ROWS, ROWS).state()))
    with pytest.raises(DataError) as refused:
        stream(tokenizer, ROWS, OTHERS[changed]).load_state(state)
    assert str(refused.value) == (
        "data position: the 3 rows of source 's1' are not those that the checkpoint was written with: as many, but their "
        "order, prompts or other columns differ; resume with the same data, or start a new run"
    )
    again = stream(tokenizer, ROWS, [dict(reversed(row.items())) for row in ROWS])  # the order of columns says nothing
    again.load_state(state)
    assert again.cautions(state) == []


def test_other_weights_of_a_mixture_are_refused_and_equal_shares_are_not(tokenizer):
    def mixture(*weights):
        sources = [Source(f"s{i}", rows_of(ROWS), weight) for i, weight in enumerate(weights)]
        return PromptStream(sources, PromptEncoder(tokenizer), 2)

    state = json.loads(json.dumps(mixture(1.0, 3.0).state()))
    mixture(0.5, 1.5).load_state(state)
    mixture(3.0, 1.0).load_state({name: value for name, value in state.items() if "millionths" not in name})
    with pytest.raises(DataError) as refused:
        mixture(3.0, 1.0).load_state(state)
    assert str(refused.value) == (
        "data position: source 's0' gives 75% of the prompts here and 25% in the checkpoint; resume with the same "
        "weights, or start a new run"
    )


def test_rows_dropped_before_a_row_are_seen():
    kept = [Row(0, "x:1", ROWS[0]), Row(2, "x:3", ROWS[2])]
    assert digest_rows(kept, "prompt") != digest_rows(rows_of([ROWS[0], ROWS[2]]), "prompt")
    assert digest_rows(rows_of(ROWS), "prompt") != digest_rows(rows_of(ROWS), "answer")


def test_an_older_checkpoint_resumes_and_says_that_rows_could_not_be_compared(tokenizer):
    whole = stream(tokenizer, ROWS).state()
    older = {name: value for name, value in whole.items() if name not in ("0.digest", "rendering")}
    resumed = stream(tokenizer, OTHERS["an answer"])
    resumed.load_state(older)
    [line] = resumed.cautions(older)
    assert line.startswith("the checkpoint is of an earlier version and has no digest of the training rows")


def test_prompts_that_are_rendered_otherwise_are_said_and_go_on(tokenizer):
    state = stream(tokenizer, ROWS).state()
    resumed = stream(tokenizer, ROWS, system_prompt="Be brief.")
    resumed.load_state(state)
    [line] = resumed.cautions(state)
    assert line.startswith(
        "the first training rows become other tokens than when the checkpoint was written: tokenizer,"
    )


def test_values_that_json_has_no_form_for_are_digested_by_content_and_not_by_address():
    class Odd: ...

    def row(**changes):
        values = {
            "day": date(2026, 1, 2),
            "raw": b"ab",
            "set": {"x", "y"},
            "grid": np.eye(2),
            "odd": Odd(),
            3: {1: "a", "b": 2},
        }
        return digest_rows(rows_of([values | changes]), "prompt")

    assert row() == row(odd=Odd())
    others = [
        row(day=date(2026, 1, 3)), row(raw=b"ac"), row(set={"x"}), row(grid=2 * np.eye(2)), row(grid=np.eye(2, dtype=int)),
        row(odd="Odd"), row(**{"4": 1}),
    ]  # fmt: skip
    assert len({row(), *others}) == 8
    assert digest_arrays([np.arange(4)]) != digest_arrays([np.arange(4).reshape(2, 2)])


def test_the_digest_is_the_same_in_every_process(tmp_path):
    code = (
        "from apportion.data.digest import digest_rows; from apportion.data.rows import Row\n"
        "print(digest_rows([Row(0, 'x', {'prompt': 'é', 'tags': {'a', 'b', 'c'}, 'odd': object()})], 'prompt'))"
    )
    said = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(digest.__file__).parents[2])}
        said.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout)
    assert len(said) == 1 and said.pop().strip().isdigit()


def test_of_rows_that_are_made_when_read_it_is_their_origin_and_a_sample(monkeypatch):
    def made(**parameters):
        return load_sources({"source": "gym:chain_sum", "size": 500, **parameters})[0]

    assert made().digest == made().digest
    assert len({made().digest, made(seed=1).digest, made(size=501).digest, made(max_terms=3).digest}) == 4
    read = []
    rows = made().rows
    item = type(rows).__getitem__
    monkeypatch.setattr(type(rows), "__getitem__", lambda self, index: read.append(index) or item(self, index))
    made()
    digest_rows(rows, "prompt")
    assert len(read) == digest.SAMPLED_ROWS and read[0] == 0 and read[-1] == 499


def test_rows_of_a_saved_dataset_are_read_in_portions_and_in_order(tmp_path, monkeypatch):
    import datasets

    from apportion.data import hub

    monkeypatch.setattr(hub, "PORTION", 2)
    table = datasets.Dataset.from_list([*ROWS, {"prompt": " ", "answer": ""}, *ROWS])
    table.save_to_disk(str(tmp_path / "saved"))
    [source] = load_sources(str(tmp_path / "saved"), on_bad_row="skip")
    assert list(source.rows) == [source.rows[i] for i in range(6)]
    assert [row.number for row in source.rows] == [0, 1, 2, 4, 5, 6]


def test_examples_of_the_preference_stages_are_digested_as_they_are_trained_on(tokenizer, tmp_path):
    pairs = [{"prompt": f"{i}?", "chosen": str(i), "rejected": "no", "margin": 1.0} for i in range(3)]

    def digest_of(rows, margin=None, **options):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = PairColumns(margin=margin)
        sources = load_sources(str(file), check=row_check(read_pair, columns))
        encoder = ExampleEncoder(PromptEncoder(tokenizer, **options), 64)
        return pack(encode_sources(sources, read_pair, columns, encoder, "error")[0]).digest

    swapped = [{**pairs[0], "chosen": "no", "rejected": "0"}, *pairs[1:]]
    further = [{**pairs[0], "margin": 2.0}, *pairs[1:]]
    assert digest_of(pairs) == digest_of(pairs) == digest_of(further)
    assert digest_of(pairs, "margin") != digest_of(further, "margin")
    others = [digest_of(pairs[::-1]), digest_of(swapped), digest_of(pairs, system_prompt="Be brief.")]
    assert len({digest_of(pairs), *others}) == 4
