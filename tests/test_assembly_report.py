"""What a run says at its end, and what its summary is made of."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from apportion.assembly.report import print_report, summary_of
from apportion.batch import Prompt
from apportion.cli import compose_config, to_config
from apportion.loop.state import Progress
from apportion.platform.console import ConsoleTracker
from apportion.platform.runs import RunFolder

QUESTION = Prompt("q", None, [{"role": "system", "content": "Answer."}, {"role": "user", "content": "2 + 2?\x1b[2J"}])


def summary(before: float | None, after: float | None) -> dict:
    config, _ = to_config(compose_config(["experiment=tiny_grpo", "seed=7"]))
    progress = Progress(
        step=3,
        accuracy_before=before,
        accuracy_after=after,
        answers_before=[{"prompt_id": "q", "answer": "[i]5", "reward": 0.0}],
        answers_after=[{"prompt_id": "q", "answer": "4", "reward": 1.0}],
        stage_seconds={"rollout": 4.0, "update": 5.0, "step": 10.0},
        samples=24,
        rollout_tokens=80,
        update_tokens=250,
        step_seconds=12.0,
        wall_seconds=0.0,
    )
    return summary_of(config, progress, {"policy-0": 512.0}, 30.0, [QUESTION])


def test_rates_are_over_the_seconds_of_what_they_measure():
    made = summary(0.25, 0.75)
    assert made["samples_per_second"] == 2.0 and made["rollout_tokens_per_second"] == 20.0
    assert made["update_tokens_per_second"] == 50.0 and made["wall_seconds"] == 30.0
    assert made["seconds_per_stage"] == {"rollout": 4.0, "update": 5.0} and made["seed"] == 7
    assert made["answers_after"] == [{"prompt": "2 + 2?\x1b[2J", "answer": "4", "reward": 1.0}]


def test_the_end_says_accuracy_once_with_examples_and_the_folder(capsys):
    made = summary(0.39, 0.771)
    table = io.StringIO()
    ConsoleTracker(3, console=Console(file=table, width=100)).log_summary(made)
    print_report(made, RunFolder(Path("runs/q")))
    assert table.getvalue() == ""
    assert capsys.readouterr().out.split("\n") == [
        "",
        "held-out greedy accuracy: 0.390 before, 0.771 after (+0.381)",
        "",
        "2 + 2?",
        "  before: '[i]5' (reward 0)",
        "  after:  '4' (reward 1)",
        "",
        "run folder: runs/q (summary.json, metrics.jsonl, samples.jsonl, tokens.html, plots, logs, checkpoints)",
        "",
    ]


def test_without_an_evaluation_no_accuracy_is_said(capsys):
    print_report(summary(None, None), RunFolder(Path("runs/q")))
    assert "accuracy" not in capsys.readouterr().out


def test_an_answer_without_a_reward_and_an_accuracy_that_is_not_known_are_said_as_that(capsys):
    made = summary(None, 0.5)
    made["answers_before"][0]["reward"] = None
    print_report(made, RunFolder(Path("runs/q")))
    out = capsys.readouterr().out
    assert "before: '[i]5' (no reward)" in out and "after:  '4' (reward 1)" in out and "accuracy" not in out
