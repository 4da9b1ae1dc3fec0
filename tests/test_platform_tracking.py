"""Trackers: what is written, what a resume drops, what a failing backend does to a run, what reaches the terminal."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from apportion.platform.console import ConsoleTracker, plain_text, safe_text
from apportion.platform.errors import ApportionError, ConfigError
from apportion.platform.metric_names import METRICS, as_markdown, unknown_metrics
from apportion.platform.plots import plot_run
from apportion.platform.tracking import (
    JsonlTracker,
    MultiTracker,
    TensorBoardTracker,
    TrackedRun,
    open_trackers,
    read_metrics,
)
from apportion.platform.wandb_tracking import WandbSettings, WandbTracker


class FailingTracker:
    """Works until `method` is called, then raises every time."""

    name = "wandb"
    vital = False

    def __init__(self, method):
        self.method = method
        self.calls = []

    def _call(self, method):
        self.calls.append(method)
        if method == self.method:
            raise ConnectionError("the service is away\nsecond line")

    def log(self, step, metrics):
        self._call("log")

    def log_samples(self, step, rows):
        self._call("log_samples")

    def log_summary(self, summary):
        self._call("log_summary")

    def warn(self, message):
        pass

    def state(self):
        return {"run_id": "abc"}

    def close(self):
        self._call("close")


def without_time(lines):
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def plain_console():
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=120, highlight=False), out


def test_each_step_is_one_line_with_its_numbers(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(0, {"eval/greedy_accuracy": 0.25})
    tracker.log(1, {"reward/mean": float(np.float32(0.5)), "policy/loss": float("nan")})
    assert without_time(read_metrics(tmp_path)) == [
        {"step": 0, "eval/greedy_accuracy": 0.25},
        {"step": 1, "reward/mean": 0.5, "policy/loss": None},
    ]
    tracker.close()


def test_a_line_is_on_disk_before_the_tracker_is_closed_and_is_strict_json(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(1, {"reward/mean": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["reward/mean"] is None
    tracker.close()


def test_a_step_cannot_be_logged_twice(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(0, {})
    tracker.log(1, {})
    with pytest.raises(ValueError, match="got step 1 after step 1"):
        tracker.log(1, {})
    tracker.close()


def test_a_resume_drops_later_lines_and_a_torn_one_so_that_each_step_is_there_once(tmp_path):
    first = JsonlTracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"reward/mean": float(step)})
        first.log_samples(step, [{"response": f"a{step}"}, {"response": f"b{step}"}])
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "rew')

    resumed = JsonlTracker(tmp_path, resume_step=2)
    resumed.log(3, {"reward/mean": 30.0})
    resumed.close()

    assert [(line["step"], line["reward/mean"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["response"]) for s in samples] == [(1, "a1"), (1, "b1"), (2, "a2"), (2, "b2")]


def test_a_resume_that_ends_without_a_step_drops_later_lines_and_one_that_never_began_drops_none(tmp_path):
    first = JsonlTracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {})
    first.close()
    refused = JsonlTracker(tmp_path, resume_step=2)
    refused.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    ended = JsonlTracker(tmp_path, resume_step=2)
    ended.log_summary({"steps": 2})
    ended.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named_by_file_and_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ApportionError, match=r"metrics\.jsonl:2: got a broken line"):
        JsonlTracker(tmp_path, resume_step=3)


def test_a_new_run_refuses_the_metrics_of_another(tmp_path):
    JsonlTracker(tmp_path).close()
    with pytest.raises(ConfigError, match="expected a new run's folder"):
        JsonlTracker(tmp_path)


def test_samples_keep_arrays_as_lists_and_lone_surrogates_readable(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log_samples(7, [{"token_ids": np.array([1, 2]), "response": "half \ud83d", "reward": np.float64(1)}])
    tracker.close()
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    assert line == {"step": 7, "token_ids": [1, 2], "response": "half \ud83d", "reward": 1.0}


def test_a_failing_backend_is_said_once_everywhere_and_the_run_goes_on(tmp_path):
    console, out = plain_console()
    failing = FailingTracker("log")
    tracker = MultiTracker([JsonlTracker(tmp_path), failing, ConsoleTracker(3, console=console)])
    for step in (1, 2, 3):
        tracker.log(step, {"reward/mean": 0.5})
    tracker.close()

    message = "tracking.wandb failed in log and is off from here (ConnectionError: the service is away)"
    lines = without_time(read_metrics(tmp_path))
    assert lines[0] == {"step": 1, "reward/mean": 0.5, "tracking/failures": 1.0, "warnings": [message]}
    assert [line.get("warnings") for line in lines] == [[message], None, None]
    assert out.getvalue().count(message) == 1
    assert failing.calls == ["log", "close"]


def test_a_backend_that_fails_at_the_end_is_in_the_last_line(tmp_path):
    tracker = MultiTracker([FailingTracker("close"), JsonlTracker(tmp_path)])
    tracker.log(1, {"reward/mean": 0.5})
    tracker.close()
    (line,) = read_metrics(tmp_path)
    assert line["warnings"] == [
        "tracking.wandb failed in close and is off from here (ConnectionError: the service is away)"
    ]


def test_with_neither_console_nor_file_a_failure_goes_to_stderr(capsys):
    MultiTracker([FailingTracker("log")]).log(1, {})
    assert "warning: tracking.wandb failed in log" in capsys.readouterr().err


def test_a_metrics_file_that_cannot_be_written_stops_the_run(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.close()
    with pytest.raises(ValueError, match="closed file"):
        MultiTracker([tracker]).log(1, {})


def test_a_given_up_backend_keeps_its_run_id_for_the_next_resume(tmp_path):
    tracker = MultiTracker([FailingTracker("log"), JsonlTracker(tmp_path)])
    assert tracker.state() == {"jsonl": {}, "wandb": {"run_id": "abc"}}
    tracker.log(1, {})
    assert tracker.state() == {"jsonl": {}, "wandb": {"run_id": "abc"}}
    tracker.close()


def test_a_runs_id_outlives_a_part_of_the_run_without_its_tracker(tmp_path, monkeypatch):
    asked = []

    class Wandb:
        name, vital = "wandb", False

        def __init__(self, folder, settings, config):
            asked.append(settings.run_id)

        def state(self):
            return {"run_id": asked[-1] or "made"}

        def close(self):
            pass

    monkeypatch.setattr("apportion.platform.wandb_tracking.WandbTracker", Wandb)
    kept: dict = {}
    for mode in ("online", "off", "online"):
        settings = SimpleNamespace(
            console=False,
            jsonl=False,
            tensorboard=False,
            wandb=mode,
            wandb_project="p",
            wandb_entity=None,
            wandb_tags=[],
        )
        tracker = open_trackers(settings, TrackedRun(tmp_path, "run", 2, {}, resume_step=1, resume_state=kept))
        kept = tracker.state()
        assert kept == {"wandb": {"run_id": "made"}}
    assert asked == [None, "made"]


def test_secrets_in_a_traceback_reach_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")
    tracker = MultiTracker([JsonlTracker(tmp_path)])
    tracker.warn("reward failed: 401 for https://me:pw@j/v1?api_key=sk-abcdefghijklmnopqrst with correct-horse-battery")
    tracker.log(1, {})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "401 for https://" in text
    for secret in ("sk-abc", "correct-horse", "me:pw"):
        assert secret not in text


def test_a_lone_surrogate_does_not_switch_tensorboard_off(tmp_path):
    tracker = MultiTracker([TensorBoardTracker(tmp_path)])
    tracker.log_samples(1, [{"critique": "bad \ud83d"}])
    tracker.log(1, {"reward/mean": 0.5})
    assert list(tracker.state()) == ["tensorboard"]
    tracker.close()


def test_a_name_without_documentation_is_warned_about_once(tmp_path):
    tracker = MultiTracker([JsonlTracker(tmp_path)])
    tracker.log(1, {"reward/mean": 0.0, "polcy/loss": 0.0})
    tracker.log(2, {"polcy/loss": 0.0})
    tracker.close()
    assert [line.get("warnings") for line in read_metrics(tmp_path)] == [
        ["metrics without a line in docs/metrics.md: polcy/loss"],
        None,
    ]


def test_the_table_knows_names_with_variable_parts_and_no_others():
    known = [
        "eval/pass_at_16",
        "credit/segments_mean",
        "data/skipped/too_long",
        "reward/exact_match",
        "timing/cut",
    ]
    assert unknown_metrics(
        [*known, "eval/pass_at_", "eval/acc", "timing/rollouts", "credit/a/b", "weights/version2"]
    ) == [
        "credit/a/b",
        "eval/acc",
        "eval/pass_at_",
        "timing/rollouts",
        "weights/version2",
    ]


def test_the_documentation_is_the_table():
    written = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == as_markdown(), "run: python -m apportion.platform.metric_names > docs/metrics.md"
    assert all(f"| `{name}` |" in written for name in METRICS)


def test_tensorboard_holds_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path)
    tracker.log(1, {"reward/mean": 0.25})
    tracker.log(2, {"reward/mean": 0.75})
    tracker.log_samples(2, [{"response": "<b>4</b>", "reward": 1.0}])
    tracker.close()
    resumed = TensorBoardTracker(tmp_path, resume_step=1)
    resumed.log(2, {"reward/mean": 0.5})
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_the_words_of_the_command_line_are_hidden_from_wandb_and_there_again_after(tmp_path, monkeypatch):
    words, seen = ["apportion", "train", "+judge.params.api_key=s3cret"], []
    monkeypatch.setattr("sys.argv", words)
    run = SimpleNamespace(finish=lambda: None)
    monkeypatch.setattr("wandb.init", lambda **given: seen.append((list(sys.argv), given["config"])) or run)
    WandbTracker(tmp_path, WandbSettings("offline", "apportion", "test-run"), {"seed": 1}).close()
    assert seen == [(["apportion"], {"seed": 1})]
    assert sys.argv is words


@pytest.mark.system
def test_wandb_offline_writes_a_run_and_a_resume_takes_the_same_id(tmp_path):
    settings = WandbSettings("offline", "apportion", "test-run")
    first = WandbTracker(tmp_path, settings, {"seed": 1})
    first.log(1, {"reward/mean": 0.5})
    first.log_samples(1, [{"prompt": "1+1?", "response": "2", "rewards": [1.0]}])
    first.log_summary({"accuracy_after": 0.75})
    first.close()
    second = WandbTracker(
        tmp_path, WandbSettings("offline", "apportion", "test-run", run_id=first.state()["run_id"]), {"seed": 1}
    )
    second.close()

    folders = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) >= 1
    assert all(name.endswith(first.run_id) for name in folders)
    assert second.run_id == first.run_id
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/samples*.table.json")
    assert json.loads(table.read_text())["data"] == [["1+1?", "2", "[1.0]"]]


def test_open_trackers_starts_what_was_asked_for(tmp_path):
    settings = SimpleNamespace(
        console=False,
        jsonl=True,
        tensorboard=True,
        wandb="off",
        wandb_project="p",
        wandb_entity=None,
        wandb_tags=[],
    )
    tracker = open_trackers(settings, TrackedRun(tmp_path, "run", total_steps=2, config={}))
    tracker.log(1, {"reward/mean": 1.0})
    tracker.close()
    assert sorted(tracker.state()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl", "tensorboard"]


def test_without_a_terminal_each_step_is_one_plain_line():
    console, out = plain_console()
    tracker = ConsoleTracker(total_steps=4, console=console)
    tracker.log(0, {"eval/greedy_accuracy": 0.39})
    tracker.log(
        1,
        {
            "reward/mean": 0.125,
            "rollout/response_tokens_mean": 12.04,
            "policy/kl_reference": 0.0012,
            "perf/rollout_tokens_per_second": 740.4,
            "timing/step": 10.0,
        },
    )
    tracker.close()
    assert out.getvalue().splitlines() == [
        "step 0/4  accuracy 0.390",
        "step 1/4  reward 0.125  accuracy 0.390  length 12.0  KL 0.0012  tokens/s 740  time left 0:30",
    ]


def test_a_terminal_gets_a_table_that_keeps_the_newest_rows():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=40, color_system=None)
    tracker = ConsoleTracker(total_steps=20, console=console)
    for step in range(1, 15):
        tracker.log(step, {"reward/mean": step / 100, "timing/step": 1.0})
    out.truncate(0)
    out.seek(0)
    tracker.status("step 15: rollout")
    shown = out.getvalue()
    assert "14/20" in shown and "3/20" in shown and "0.140" in shown
    assert " 2/20" not in shown
    assert "step 15: rollout" in shown
    tracker.close()


def test_a_models_text_cannot_steer_the_terminal_or_the_markup():
    hostile = "[bold red]x[/]\x1b[2J\x1b]0;title\x07 \x9b31m\u202eabc\r\nnext\x00"
    assert plain_text(hostile) == "[bold red]x[/] 31mabc next"
    assert safe_text(hostile) == "\\[bold red]x\\[/] 31mabc next"
    assert safe_text("abcdef", limit=4) == "abc…"

    out = io.StringIO()
    tracker = ConsoleTracker(2, console=Console(file=out, force_terminal=True, width=100, color_system=None))
    out.truncate(0)
    out.seek(0)
    tracker.log_samples(1, [{"prompt": "p", "response": hostile}])
    assert "[bold red]x[/] 31mabc next" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue() and "title" not in out.getvalue()
    tracker.close()


def test_plots_are_made_of_the_curves_that_a_run_has(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(0, {"eval/greedy_accuracy": 0.4})
    tracker.log(1, {"reward/mean": 0.1, "policy/kl_reference": float("nan")})
    tracker.log(2, {"reward/mean": 0.2})
    tracker.close()
    files = plot_run(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["plots/reward.png", "plots/accuracy.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_plots_of_a_folder_without_metrics_say_what_is_missing(tmp_path):
    with pytest.raises(ApportionError, match=r"got no metrics\.jsonl"):
        plot_run(tmp_path)
