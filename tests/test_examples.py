"""The examples do what they say: each alone, and all together through the real program."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from apportion.actors.reward_call import RewardCall
from apportion.actors.reward_service import ServiceSource
from apportion.actors.reward_sources import RewardEntry, function_source
from apportion.data.environments import load_environment
from apportion.data.pairs import PairColumns, read_pair
from apportion.data.sources import load_sources

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def call(completions, answer):
    n = len(completions)
    ids = [[0] * 10 for _ in range(n)]
    return RewardCall(["What is the capital?"] * n, completions, {"answer": answer}, ids, ids)


def test_the_reward_function_names_and_is_brief():
    entry = RewardEntry(function=f"{EXAMPLES}/reward.py:named_briefly", params={"max_words": 2})
    answers = [[{"role": "assistant", "content": "It is Paris , maybe"}], "paris", "Rome", "anything"]
    scores = function_source(entry).score(call(answers, ["Paris", "Paris", "Paris", None]))
    assert scores == [pytest.approx(1 - 0.1 * 3), 1.0, 0.0, None]


def test_the_dense_reward_prices_each_token_after_the_free_ones():
    source = function_source(RewardEntry(function=f"{EXAMPLES}/dense_reward.py:price_of_length"))
    assert source.score(call(["x"], ["y"])) == [[0.0] * 8 + [-0.01, -0.01]]


def test_the_step_reward_says_of_each_step_whether_it_is_short():
    source = function_source(RewardEntry(function=f"{EXAMPLES}/step_reward.py:short_steps", params={"longest": 7}))
    assert source.score(call(["one\n\ntwo more\n\nx"], [""])) == [[0.0, -1.0, 0.0]]


def test_the_rows_function_makes_products_and_the_same_again():
    source = {"source": f"function:{EXAMPLES}/rows.py:products", "count": 3, "seed": 1}
    [first], [again] = load_sources(source), load_sources(source)
    assert [row.values for row in first.rows] == [row.values for row in again.rows]
    assert len(first.rows) == 3
    for row in first.rows:
        a, b = map(int, re.findall(r"\d+", row.values["prompt"]))
        assert row.values["answer"] == str(a * b)


def test_the_questions_load_and_share_none_with_the_held_out_ones():
    [questions] = load_sources(str(EXAMPLES / "questions.jsonl"))
    [held_out] = load_sources(str(EXAMPLES / "held_out.jsonl"))
    assert (len(questions.rows), len(held_out.rows)) == (13, 4)
    assert not {r.values["answer"] for r in questions.rows} & {r.values["answer"] for r in held_out.rows}
    assert questions.rows[-1].values["prompt"][0]["role"] == "system"


def test_the_environment_is_won_by_following_its_hints():
    game = load_environment(f"{EXAMPLES}/guess.py:Guess")(highest=8)
    [source] = load_sources({"source": f"function:{EXAMPLES}/guess.py:rows", "highest": 8})
    assert [row.values["number"] for row in source.rows] == list(range(1, 9))
    assert game.reset(number=source.rows[5].values["number"]) == "I think of a number from 1 to 8. Your guess?"
    played = [game.step(action) for action in ("what?", "4", "I say 7", "6")]
    assert [step[0] for step in played] == ["Answer with a number.", "Higher.", "Lower.", "Right."]
    assert [step[1:3] for step in played] == [(-0.1, False), (0.0, False), (0.0, False), (1.0, True)]


def test_the_pairs_are_pairs():
    [source] = load_sources(str(EXAMPLES / "pairs.jsonl"))
    pairs = [read_pair(row.values, PairColumns()) for row in source.rows]
    assert len(pairs) == 6
    assert pairs[0].answers == ["Paris", "Lyon, I believe."]


def test_the_service_answers_what_the_program_asks():
    spec = importlib.util.spec_from_file_location("example_service", EXAMPLES / "reward_service.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = ThreadingHTTPServer(("127.0.0.1", 0), module.Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        source = ServiceSource(RewardEntry(function=f"http://127.0.0.1:{server.server_port}", timeout_seconds=10))
        assert source.score(call(["Rome", "it is paris"], ["Paris", "Paris"])) == [0.0, 1.0]
        source.close()
    finally:
        server.shutdown()
        server.server_close()


def readme_command(start):
    [line] = [line for line in README.splitlines() if line.startswith(start)]
    return shlex.split(line)


@pytest.mark.system
def test_a_model_data_reward_and_recipe_of_ones_own_train_as_the_readme_says(tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def run(words):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    assert "parameters, 261 tokens" in run(readme_command("python examples/make_model.py"))
    recipe = readme_command("apportion train --config-dir examples")
    run([*recipe, "train.steps=1", "run_name=mine", "evaluation.after=false", "checkpoint.final=false"])

    folder = tmp_path / "runs" / "mine"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 1
    assert summary["accuracy_before"] == 0.0
    [before, step] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (before["step"], step["step"]) == (0, 1)
    assert step["rollout/trajectories"] == 16
    assert step["reward/failed_share"] == 0
    assert step["reward/mean"] == pytest.approx(
        step["reward/named_briefly"] + 0.5 * step["reward/price_of_length"], abs=1e-6
    )
    [first, *_] = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert "What is the capital of" in first["prompt"]
