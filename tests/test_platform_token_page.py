"""The page of a run's samples: colours follow advantages, text is escaped, and a run without samples says so."""

import json

import pytest

from apportion.platform.errors import ApportionError
from apportion.platform.token_page import colour, spread_steps, write_token_page


def sample(step=1, **others):
    return {
        "step": step, "prompt": "1 + 1?", "response": "ab", "reward": 1.0, "finish_reason": "stop", "policy_version": 0,
        "tokens": ["a", "b", "c"], "advantages": [0.5, -1.0, 0.0],
    } | others  # fmt: skip


def page_of(folder, *samples):
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return write_token_page(folder).read_text()


def test_a_token_is_as_strong_as_its_share_of_the_samples_largest_advantage(tmp_path):
    page = page_of(tmp_path, sample())
    assert f'<span style="background:{colour(0.5)}" title="+0.5">a</span>' in page
    assert f'<span style="background:{colour(-1.0)}" title="-1">b</span>' in page
    assert "<span>c</span>" in page
    assert colour(0.5) == "rgba(44, 160, 44, 0.35)"


def test_text_of_models_data_and_judges_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    critique = {"wrong_steps": [0], "failure": "", "answer": evil, "detail": ""}
    page = page_of(
        tmp_path,
        sample(prompt=evil, tokens=[evil, '"', "'"], finish_reason=evil, critiques=[critique], wrong_steps=[0]),
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert "default-src 'none'" in page


def test_samples_without_advantages_are_shown_without_colour(tmp_path):
    page = page_of(tmp_path, sample(advantages=None), sample(advantages=[0.0, 0.0, 0.0]), sample(reward=None))
    assert page.count("<span>a</span>") == 2
    assert "reward none" in page


def test_few_of_many_steps_are_shown(tmp_path):
    page = page_of(tmp_path, *(sample(step) for step in range(1, 41)))
    assert [step for step in range(1, 41) if f"<h2>Step {step}</h2>" in page] == [1, 11, 21, 30, 40]
    assert spread_steps([3, 9], 5) == [3, 9]


def test_a_run_without_samples_says_what_keeps_them(tmp_path):
    with pytest.raises(ApportionError, match=r"got no samples.*tracking.samples_per_step"):
        write_token_page(tmp_path)
    (tmp_path / "samples.jsonl").write_text('half\n{"step": 1}\n')
    with pytest.raises(ApportionError, match=r"samples.jsonl:1: got a broken line"):
        write_token_page(tmp_path)


def test_a_killed_run_and_half_a_character_are_shown_all_the_same(tmp_path):
    line = json.dumps(sample(tokens=["\ud83d", "b", "c"]))
    (tmp_path / "samples.jsonl").write_text(line + '\n{"step": 2, "to')
    page = write_token_page(tmp_path).read_text()
    assert "\\ud83d" in page
    assert "<h2>Step 2</h2>" not in page
