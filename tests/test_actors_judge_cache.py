"""The judge's caches: what is asked once, what is kept on disk, and what is asked again."""

import json
import os

import pytest
from judge_parts import Scripted, batch_of, judge_with, prompt

from apportion.actors.judge_cache import CritiqueCache, critique_key
from apportion.batch import Critique


def test_equal_responses_are_asked_once_and_later_batches_not_at_all():
    source = Scripted(Critique([0]))
    judge = judge_with(source, critiques=2)
    first, _ = judge.judge(batch_of("a", "a", "b"), [prompt()], [0, 1, 2])
    second, marks = judge.judge(batch_of("b", "a"), [prompt()], [0, 1])
    assert len(source.asked) == 2
    assert (first.critiques, first.cached) == (6, 2) and (second.critiques, second.cached) == (4, 4)
    assert marks.wrong_steps == [[0], [0]]


def test_critiques_are_kept_on_disk_as_json_and_found_by_content(tmp_path):
    source = Scripted(Critique([0], "", "Step 1 is wrong.\n[1]"))
    judge_with(source, tmp_path).judge(batch_of("a"), [prompt()], [0])
    again = Scripted(Critique([]))
    report, marks = judge_with(again, tmp_path).judge(batch_of("a"), [prompt()], [0])
    assert again.asked == [] and report.cached == 4 and marks.wrong_steps == [[0]]
    (file,) = tmp_path.rglob("*.json")
    kept = {"wrong_steps": [0], "failure": "", "answer": "Step 1 is wrong.\n[1]", "detail": ""}
    assert json.loads(file.read_text()) == [kept] * 4
    judge_with(again, tmp_path).judge(batch_of("a"), [prompt(text="2 + 2?")], [0])
    judge_with(again, tmp_path, critiques=2).judge(batch_of("a"), [prompt()], [0])
    assert len(again.asked) == 2


def entry(wrong, failure=""):
    return json.dumps([{"wrong_steps": wrong, "failure": failure, "answer": "", "detail": ""}])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        entry(["a"]),
        "7",
        entry([2]),  # of two steps, from 0
        entry([-1]),
        entry([0], "down"),
        entry(None),
        entry(None, "down"),
        "[" * 200_000,
        "[" + "9" * 5000 + "]",
        " " * (2**24 + 1),
    ],
    ids=lambda text: text[:60],
)
def test_a_file_that_holds_no_critiques_is_asked_again_and_told(tmp_path, text):
    key = critique_key("j", "c", 1)
    (tmp_path / key[:2]).mkdir()
    (tmp_path / key[:2] / f"{key}.json").write_text(text)
    cache = CritiqueCache(tmp_path)
    assert cache.get(key, 1, 2) is None
    assert "asked again" in cache.problem and "\n" not in cache.problem


def test_a_pipe_among_the_kept_critiques_holds_nobody_up(tmp_path):
    key = critique_key("j", "c", 1)
    (tmp_path / key[:2]).mkdir()
    os.mkfifo(tmp_path / key[:2] / f"{key}.json")
    cache = CritiqueCache(tmp_path)
    assert cache.get(key, 1, 2) is None
    assert "it is no regular file" in cache.problem


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    judge = judge_with(Scripted(Critique([0])), tmp_path / "file")
    report, marks = judge.judge(batch_of("a"), [prompt()], [0])
    assert marks.wrong_steps == [[0]] and "cannot be read, so it is asked again" in report.cache_problem


def test_a_judge_that_was_down_is_asked_again_while_an_unreadable_answer_is_kept(tmp_path):
    source = Scripted(Critique(None, "down"))
    judge = judge_with(source, tmp_path)
    judge.judge(batch_of("a"), [prompt()], [0])
    source.critiques = [Critique(None, "unparseable", "well")]
    for _ in range(2):
        judge.judge(batch_of("a"), [prompt()], [0])
    assert len(source.asked) == 2
