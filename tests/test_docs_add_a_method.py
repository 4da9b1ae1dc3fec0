"""The page docs/add-a-method.md, run as it stands: its files, its tests, its command."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "add-a-method.md"


@pytest.fixture
def folder(tmp_path):
    for name, body in re.findall(r"```\w+ file=(\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
    return tmp_path


def test_the_pages_own_tests_pass(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    try:
        tests = [f for name, f in runpy.run_path(str(folder / "test_opo.py")).items() if name.startswith("test_")]
    finally:
        sys.modules.pop("opo", None)
    assert len(tests) == 2
    for test in tests:
        test()


@pytest.mark.slow
def test_the_pages_method_is_refused_a_group_of_one(folder):
    program = Path(sys.executable).parent / "apportion"
    words = "plan experiment=tiny_grpo --config-dir my_conf algorithm=opo rollout.responses_per_prompt=1"
    done = subprocess.run([str(program), *words.split()], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stdout
    assert "rollout.responses_per_prompt: got 1 with credit opo.Opo" in done.stderr


@pytest.mark.system
def test_the_pages_command_trains_with_the_method_and_reports_its_metric(folder):
    [command] = re.findall(r"```bash run\n(.*?)```", PAGE.read_text(), re.DOTALL)
    program = Path(sys.executable).parent / "apportion"
    words = [str(program), *shlex.split(command)[1:], "run_name=page"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=400, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "runs/page/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "credit/baseline" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(0.0 <= line["credit/baseline"] <= 1.0 for line in trained)
    samples = [json.loads(line) for line in (folder / "runs/page/samples.jsonl").read_text().splitlines()]
    assert samples and all(len(sample["advantages"]) == len(sample["tokens"]) for sample in samples)
    assert list((folder / "runs/page/plots").glob("*.png"))
