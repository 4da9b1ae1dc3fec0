"""Prompts to train on, found unfit before anything starts where that is cheap."""

from __future__ import annotations

import json

import pytest

from apportion.assembly.inputs import FIRST_ROWS, load_prompts
from apportion.cli import compose_config, to_config
from apportion.data import templates
from apportion.data.errors import DataError
from apportion.data.prompts import load_tokenizer


def rows(tmp_path, long_at: int) -> str:
    """A file of 70 rows of which one has a prompt of some hundred tokens."""
    texts = ["0123456789" * 40 if place == long_at else "1 + 1?" for place in range(FIRST_ROWS + 6)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "answer": "2"}) + "\n" for text in texts))
    return str(file)


def loaded(tmp_path, tiny, long_at: int, policy: str):
    words = [
        "experiment=tiny_grpo",
        f"data.train={rows(tmp_path, long_at)}",
        "data.eval=null",
        f"data.on_bad_row={policy}",
    ]
    words += ["data.max_prompt_tokens=64", "evaluation.before=false", "evaluation.after=false", "data.limit=null"]
    config, _ = to_config(compose_config(words))
    return load_prompts(config, load_tokenizer(tiny))


def test_too_long_a_prompt_among_the_first_rows_is_found_at_once_with_its_line(tmp_path, tiny):
    with pytest.raises(DataError, match=r"questions.jsonl:4: got a prompt of \d+ tokens, expected at most 64"):
        loaded(tmp_path, tiny, 3, "error")


def test_rows_further_on_are_read_when_they_are_drawn_and_skipping_is_left_to_the_drawing(tmp_path, tiny):
    stream, _ = loaded(tmp_path, tiny, FIRST_ROWS, "error")
    with pytest.raises(DataError, match=rf"questions.jsonl:{FIRST_ROWS + 1}: got a prompt"):
        stream.next_batch(len(stream))
    stream, _ = loaded(tmp_path, tiny, 3, "skip")
    assert stream.skipped == {}
    stream.next_batch(len(stream))
    assert stream.skipped == {"too_long": 1}


def test_a_chat_template_at_fault_is_found_before_anything_starts_also_where_rows_are_skipped(
    tmp_path, tiny, monkeypatch
):
    def late(*arguments):
        raise templates.Overrun("took more than 10 s")

    monkeypatch.setattr(templates, "apply", late)
    with pytest.raises(
        DataError, match=r"questions.jsonl:2: the chat template took more than 10 s, for 2 conversations"
    ):
        loaded(tmp_path, tiny, FIRST_ROWS, "skip")
