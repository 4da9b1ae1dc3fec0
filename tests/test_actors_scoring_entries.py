"""Entries of rewards: how functions are found and refused, their columns, and reports that merge."""

import math

import pytest
from scoring_parts import batch_of, lengths, score

from apportion.actors.reward_check import check_functions
from apportion.actors.reward_sources import RewardEntry, parse_entries
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
        ({"name": "none"}, "got neither of function and urls, expected one of the two"),
        ({"function": 5}, "reward.functions 5: got function 5, expected a function's name"),
        ({"urls": 5}, "reward.functions urls: got addresses, expected a list of addresses"),
        ({"urls": []}, "expected a list of addresses"),
        ({"urls": ["http://a", 5]}, "expected a list of addresses"),
        ({"function": "gsm8k", "weight": "2"}, "reward.functions gsm8k: got weight '2', expected a number"),
        ({"function": "gsm8k", "weight": True}, "got weight True, expected a number"),
        ({"function": "gsm8k", "timeout_seconds": "fast"}, "got timeout_seconds 'fast', expected above 0"),
        ({"function": "gsm8k", "timeout_seconds": math.inf}, "got timeout_seconds inf, expected above 0"),
        ({"function": "gsm8k", "name": 5}, "got name 5, expected text"),
        ({"function": "gsm8k", "params": 5}, "got params 5, expected a mapping of names to values"),
        ({"function": "gsm8k", "params": {1: 2}}, "got params {1: 2}, expected a mapping of names to values"),
        ({"function": "gsm8k", "one_by_one": "yes"}, "got one_by_one 'yes', expected true or false"),
        ({"function": "gsm8k", "batch_size": "8"}, "got batch_size '8', expected at least 1 (a whole number)"),
        ({"function": "gsm8k", "batch_size": 1.5}, "got batch_size 1.5, expected at least 1 (a whole number)"),
        ({"function": "gsm8k", "retries": "3"}, "got retries '3', expected at least 0 (a whole number)"),
        ({"function": "gsm8k", "retries": None}, "got retries None, expected at least 0 (a whole number)"),
        ({"function": "gsm8k", "auth_env": 5}, "got auth_env 5, expected an environment variable's name"),
        (
            {"function": "http://me:pa55@h/score?key=hidden", "weight": "2"},
            "reward.functions http://h/score: got weight '2'",
        ),
    ],
)
def test_an_entry_that_cannot_be_used_is_refused_in_one_line(entry, message):
    with pytest.raises(ConfigError) as caught:
        Scorer([entry])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kinds_of_settings_are_checked_before_anything_starts():
    with pytest.raises(ConfigError, match=r"reward.functions http://h: got retries '3', expected at least 0"):
        check_functions(["gsm8k", {"function": "http://h", "retries": "3"}], 60.0)


def test_null_settings_of_an_entry_are_those_not_given():
    [entry] = parse_entries({"function": "gsm8k", "params": None, "timeout_seconds": None, "batch_size": None}, 7.0)
    assert entry == RewardEntry("gsm8k", timeout_seconds=7.0)


@pytest.mark.parametrize("name", ["mean", "std", "square", "failed_share", "no_opinion_share"])
@pytest.mark.parametrize("entry", [{"function": lengths}, {"function": "model:nowhere"}, {"urls": "http://h"}])
def test_a_component_with_the_name_of_another_metric_is_refused(name, entry):
    with pytest.raises(ConfigError) as caught:
        check_functions([{**entry, "name": name}], 60.0)
    assert str(caught.value) == (
        f"reward.functions: got a component named {name!r} (that is the name of another metric), expected one that can "
        "be logged as reward/NAME; give it another `name:`"
    )


def test_names_are_refused_wherever_they_come_from_and_other_ones_are_not(tmp_path):
    (tmp_path / "mine.py").write_text("def mean(completions):\n    return [1.0] * len(completions)\n")
    mine = f"{tmp_path / 'mine.py'}:mean"
    for entry in (mine, "http://mean:8000/score"):
        with pytest.raises(ConfigError, match="got a component named 'mean'"):
            check_functions([entry], 60.0)
    with pytest.raises(ConfigError, match=r"got a component named 'a/b' \(it has a /\), expected"):
        check_functions([{"function": lengths, "name": "a/b"}], 60.0)
    found = check_functions(["gsm8k", {"function": mine, "name": "mine"}, "http://h:1/a"], 60.0)
    assert [source.name for source in found] == ["gsm8k", "mine"]


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
