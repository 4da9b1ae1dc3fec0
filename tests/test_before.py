"""Stages that a recipe runs first: what a line must be, what is done already, and what a failure says."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from apportion.before import run_before
from apportion.cli import compose_config, main, to_config
from apportion.conf.before import stages
from apportion.conf.teachers import teacher_paths
from apportion.platform.errors import ApportionError, ConfigError


def config_of(tmp_path, *lines, recipe="tiny_grpo"):
    config, _ = to_config(compose_config([f"experiment={recipe}", f"runs_folder={tmp_path}"]))
    if lines:
        config.before = list(lines)
    return config


def test_a_line_is_words_as_a_shell_reads_them(tmp_path):
    [stage] = stages(config_of(tmp_path, "reward-model run_name=judge data.train='[{source: a b.jsonl}]'"))
    assert stage.words == ["reward-model", "run_name=judge", "data.train=[{source: a b.jsonl}]"]
    assert stage.run_name == "judge"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train run_name=x", "expected it to begin with one of sft, reward-model, dpo"),
        ("", "expected it to begin with one of sft, reward-model, dpo"),
        ("dpo data.train=x.jsonl", "expected one run_name=NAME in it"),
        ("dpo run_name=a run_name=b", "expected one run_name=NAME in it"),
        ("dpo run_name='a", "expected words as a shell reads them"),
    ],
)
def test_any_other_line_is_refused(tmp_path, line, expected):
    with pytest.raises(ConfigError, match=expected):
        stages(config_of(tmp_path, line))


def test_two_stages_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="got run_name=a twice"):
        stages(config_of(tmp_path, "dpo run_name=a", "sft run_name=a"))


def test_a_stage_whose_run_has_ended_is_not_run_again(tmp_path):
    (tmp_path / "teacher/checkpoints/step-000016").mkdir(parents=True)
    (tmp_path / "teacher/summary.json").write_text("{}")
    run_before(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl"))  # it would fail if it ran


@pytest.mark.parametrize("left", ["teacher", "teacher/checkpoints/step-000008"])
def test_what_an_unfinished_stage_left_is_not_taken_for_its_result(tmp_path, left):
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"a stage that did not end.*apportion dpo resume=.*or remove that folder"):
        run_before(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl"))


def test_a_failing_stage_stops_the_run_after_its_own_message(tmp_path, capfd):
    line = "dpo run_name=teacher model.path=builtin:tiny data.train=nowhere.jsonl"
    with pytest.raises(ApportionError, match=r"before: `apportion dpo run_name=teacher \.\.\.` ended with exit code"):
        run_before(config_of(tmp_path, line))
    assert "error: nowhere.jsonl: no such file" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_mistake_in_a_later_stage_is_refused_before_the_first_is_trained(tmp_path, capsys, command):
    first = "dpo run_name=first model.path=builtin:tiny data.train=nowhere.jsonl"
    second = "dpo run_name=second model.path=builtin:tiny data.train=nowhere.jsonl dpo.bta=0.1"
    words = ["experiment=tiny_grpo", f"runs_folder={tmp_path}", f"before=['{first}','{second}']"]
    assert main([command, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: before: second: dpo.bta: ")
    assert "did you mean" in captured.err and "beta" in captured.err
    assert "first: apportion" not in captured.out


def test_teachers_that_are_still_to_be_trained_stand_for_models_like_the_policys(tmp_path):
    config = config_of(tmp_path, recipe="aligndistil")
    own = config.model.path
    assert teacher_paths(config) == {"teachers.dpo": own, "teachers.other": own}
    config.before = []
    assert teacher_paths(config)["teachers.dpo"] == "aligndistil-dpo"


def test_a_resumed_run_runs_nothing_first(tmp_path):
    config = config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl")
    config.resume = "some-run"
    run_before(config)


def test_a_name_that_is_taken_is_refused_before_a_stage_is_trained(tmp_path):
    (tmp_path / "mine").mkdir()
    config = config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl")
    config.run_name = "mine"
    with pytest.raises(ConfigError, match="run_name: got 'mine'"):
        run_before(config)


def test_an_interruption_ends_the_stage_too(tmp_path, monkeypatch):
    started = []

    class Sleeper(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **options)
            started.append(self)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()  # to the run alone

    monkeypatch.setattr("apportion.before.subprocess.Popen", Sleeper)
    with pytest.raises(KeyboardInterrupt):
        run_before(config_of(tmp_path, "dpo run_name=teacher"))
    assert [process.returncode for process in started] == [-signal.SIGTERM]
