"""Stages that a recipe runs first: what a line must be, what is done already, and what a failure says."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from apportion.before import run_before
from apportion.cli import compose_config, main, to_config
from apportion.conf.before import done, keep_words, stages
from apportion.conf.teachers import teacher_paths
from apportion.edges import terminated_as_interrupt
from apportion.platform.errors import ApportionError, ConfigError
from apportion.platform.run_lock import held


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


def finished(tmp_path):
    (tmp_path / "teacher/checkpoints/step-000016").mkdir(parents=True)
    (tmp_path / "teacher/summary.json").write_text("{}")


def test_a_run_of_the_same_words_is_reused_and_one_of_other_words_is_refused(tmp_path, capsys):
    line = "dpo run_name=teacher data.train=nowhere.jsonl dpo.beta=0.1 +data.token=s3cret"
    finished(tmp_path)
    [stage] = stages(config_of(tmp_path, line))
    keep_words(stage, str(tmp_path))
    assert "s3cret" not in (tmp_path / "teacher/before.json").read_text()
    run_before(config_of(tmp_path, line))
    assert capsys.readouterr().out == f"reusing {tmp_path / 'teacher'}\n"
    with pytest.raises(ConfigError) as caught:
        run_before(config_of(tmp_path, line.replace("0.1", "0.5")))
    assert str(caught.value) == (
        f"before: {tmp_path / 'teacher'} was made by other words (these differ: dpo.beta=0.1 dpo.beta=0.5), expected a "
        "run of this line: give the line another run_name, or remove that folder"
    )


def test_a_run_that_was_started_by_hand_is_reused_and_said_to_be(tmp_path, capsys):
    finished(tmp_path)
    run_before(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl"))
    assert capsys.readouterr().out.startswith(f"reusing {tmp_path / 'teacher'}, which was started by hand")


def test_a_stage_that_has_ended_well_leaves_its_words(tmp_path, monkeypatch):
    class Trainer(subprocess.Popen):
        def __init__(self, command, **options):
            finished(tmp_path)
            super().__init__([sys.executable, "-c", ""], **options)

    monkeypatch.setattr("apportion.before.subprocess.Popen", Trainer)
    run_before(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl"))
    words = json.loads((tmp_path / "teacher/before.json").read_text())["words"]
    assert words == ["dpo", "run_name=teacher", "data.train=nowhere.jsonl"]


def test_the_words_of_a_stage_are_shown_without_secrets(tmp_path, monkeypatch, capsys):
    class Trainer(subprocess.Popen):
        def __init__(self, command, **options):
            assert "+data.token=s3cret" in command
            finished(tmp_path)
            super().__init__([sys.executable, "-c", ""], **options)

    monkeypatch.setattr("apportion.before.subprocess.Popen", Trainer)
    run_before(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl +data.token=s3cret"))
    assert capsys.readouterr().out == (
        "first: apportion dpo run_name=teacher data.train=nowhere.jsonl +data.token=<redacted> "
        f"runs_folder={tmp_path}\n"
    )


def test_a_stage_that_is_running_is_said_to_be(tmp_path):
    (tmp_path / "teacher").mkdir()
    with held(tmp_path / "teacher"), pytest.raises(ConfigError, match="teacher is running in another process"):
        run_before(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_a_stage_ends_when_its_run_is_killed_outright():
    sleep = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    script = (
        "import os, subprocess, sys, time; from apportion.before import _ended_with\n"
        f"subprocess.Popen({sleep}, start_new_session=True, preexec_fn=_ended_with(os.getpid()))\n"
        "print('started', flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "started\n"
    driver.kill()
    driver.communicate(timeout=60)  # the pipe closes when the stage, which has inherited it, is gone too


def test_a_terminal_that_closes_ends_a_run_unless_nohup_said_otherwise():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), terminated_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with terminated_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("left", ["teacher", "teacher/checkpoints/step-000008"])
def test_what_an_unfinished_stage_left_is_not_taken_for_its_result(tmp_path, left):
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"a stage that did not end.*apportion dpo resume=.*or remove that folder"):
        run_before(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl"))


@pytest.mark.slow
def test_a_failing_stage_stops_the_run_after_its_own_message(tmp_path, capfd):
    line = "dpo run_name=teacher model.path=builtin:tiny data.train=nowhere.jsonl"
    with pytest.raises(ApportionError, match=r"before: `apportion dpo run_name=teacher \.\.\.` ended with exit code"):
        run_before(config_of(tmp_path, line))
    assert "error: nowhere.jsonl: no such file" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.slow
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


def test_a_stage_whose_start_failed_is_run_again(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.yaml").write_text("tracking: {jsonl: true}\n")
    [stage] = stages(config_of(tmp_path, "dpo run_name=teacher data.train=nowhere.jsonl"))
    assert not done(stage, str(tmp_path))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="is of a stage that did not end"):
        done(stage, str(tmp_path))
