"""Entries of rewards: how functions are found and refused, their columns, and reports that merge."""

import math

import pytest
from scoring_parts import batch_of, lengths, score

from apportion.actors.scoring import Scorer, ScoreReport
from apportion.platform.errors import ConfigError


def test_functions_are_found_by_file_by_dotted_path_and_by_verifier_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def short(completions, limit=3, **columns):\n    return [float(len(c) < limit) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    entries = [
        {"function": "mine.py:short", "params": {"limit": 2}},
        "apportion.data.verifiers.exact_match",
        "numeric_match",
    ]
    batch, report = score(entries, *batch_of("0", "the 1"))
    assert batch.rewards.tolist() == [3.0, 1.0]
    assert report.component_means == {"short": 0.5, "exact_match": 0.5, "numeric_match": 1.0}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("numeric_mach", "expected package.module:function, file.py:function or one of exact_match"),
        ("numeric_mach", "did you mean 'numeric_match'?"),
        ("nowhere.py:f", "no file"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("math:squrt", "math has no 'squrt' (did you mean 'sqrt'?)"),
        ({"function": "numeric_match", "wieght": 2}, "got key 'wieght'"),
        ({"function": "numeric_match", "weight": math.nan}, "got weight nan, expected a number"),
        ({"function": "numeric_match", "timeout_seconds": 0}, "got timeout_seconds 0, expected above 0"),
        ({"function": "f.py:g", "urls": ["http://a"]}, "expected one of the two"),
        ({"urls": ["nonsense"]}, "expected http://host:port/path"),
        (
            {"function": "http://h/score", "auth_env": "APPORTION_TEST_UNSET"},
            "APPORTION_TEST_UNSET (auth_env) is not set",
        ),
        (7, "got 7, expected a function's name"),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused_in_one_line(entry, message):
    with pytest.raises(ConfigError) as caught:
        Scorer([entry])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_on_import_is_named_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(
        ConfigError, match=r"cannot be imported .ModuleNotFoundError: No module named 'not_installed_any"
    ):
        Scorer(f"{tmp_path / 'broken.py'}:f")


def test_params_that_a_function_does_not_take_are_refused():
    def f(completions, limit=1):
        return [1.0]

    with pytest.raises(ConfigError, match=r"got params key 'limti', the function has none .did you mean 'limit'"):
        Scorer({"function": f, "params": {"limti": 2}})


def test_missing_and_reserved_columns_are_found_before_a_run():
    _, prompts = batch_of("a")
    scorer = Scorer("gym")
    with pytest.raises(ConfigError, match="gym: needs 'task', 'entry', 'task_parameters', the data has columns answer"):
        scorer.check_columns(prompts)
    Scorer("numeric_match").check_columns(prompts)
    prompts[0].columns["completions"] = "x"
    with pytest.raises(ConfigError, match="got a column named 'completions'"):
        Scorer("numeric_match").check_columns(prompts)


def test_reports_of_shards_merge_into_one():
    _, first = score(lengths, *batch_of("a", "abc"))
    _, second = score(lambda completions: [None, "x"], *batch_of("a", "b"))
    whole = ScoreReport.merge([first, second])
    assert (whole.samples, whole.scored, whole.no_opinion, whole.failed) == (4, 2, 1, {"wrong_type": 1})
    assert whole.component_means["lengths"] == 2.0
    assert math.isnan(whole.component_means["<lambda>"])
    assert whole.first_traceback == second.first_traceback
