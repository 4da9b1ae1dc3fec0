"""What the command line prints has no secret in it: errors, Hydra's own lines, the composed configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apportion.cli import main

GONE = "<redacted>"


@pytest.fixture(autouse=True)
def own_streams(monkeypatch, capsys):
    """`main` puts masked streams in place of these, for good."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)


@pytest.mark.parametrize(
    ("words", "secrets", "said"),
    [
        (
            ['before=["sftx judge.api_key=SEKRIT1234567890 run_name=a"]'],
            ["SEKRIT"],
            f"before: got 'sftx judge.api_key={GONE} run_name=a', expected it to begin with one of sft",
        ),
        (
            ["reward.functions=http://u:PW@h:1/x?key=K,"],
            ["PW", "=K"],
            f"reward.functions: got 'http://{GONE}@h:1/x?key={GONE},', expected one value",
        ),
        (
            ["reward.functions=[http://u:PW@h:1/x?key=K"],
            ["PW", "=K"],
            "reward.functions: got an address that does not begin with http:// or https://, expected http://host:port/path",
        ),
        (["train.steps=[http://u:PW@h:1/x?key=K"], ["PW", "=K"], f"http://{GONE}@h:1/x?key={GONE}"),
        (["reward.functions=[{function: f, params: {password: SEKRIT 99"], ["SEKRIT"], f"password: {GONE}"),
        (["train.steps=hf_AbCdEfGhIjKlMnOpQr"], ["AbCd"], f"train.steps: got '{GONE}', expected an integer"),
        (["train.steps=5", "trian.api_key=SEKRIT1"], ["SEKRIT1"], "trian.api_key: got an unknown key"),
        (["SECRET_KEY=SEKRIT1,b=x"], ["SEKRIT1"], "SECRET_KEY"),
        (["judge.url=http://h/v1", "judge.model=m", "~judge.model=my-hf_AbCdEfGhIjKlMnOpQr"], ["AbCd"], GONE),
    ],
)  # fmt: skip
def test_an_error_shows_no_secret_of_a_word(words, secrets, said, capsys):
    assert main(["plan", "experiment=tiny_grpo", *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err
    assert [secret for secret in secrets if secret in shown.err + shown.out] == []


def test_a_sweeps_lines_show_no_secret(capsys):
    function = "reward.functions={function: numeric_match, weight: 2, params: {api_keys: [SEKRIT1]}}"
    main(["plan", "experiment=tiny_grpo", "-m", "seed=0,1", function])
    shown = capsys.readouterr()
    assert "#1 : experiment=tiny_grpo seed=1 reward.functions=" in shown.out
    assert GONE in shown.out and "SEKRIT1" not in shown.out + shown.err


def test_the_composed_configuration_is_printed_without_secrets(capsys):
    function = (
        "reward.functions={function: numeric_match, params: {password: two SEKRIT words, api_keys: [SEKRIT1, b]}}"
    )
    assert main(["train", "experiment=tiny_grpo", function, "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert f"password: {GONE}" in shown and "SEKRIT" not in shown
    assert "max_prompt_tokens: 96" in shown


@pytest.mark.slow
def test_an_error_of_our_own_code_keeps_its_traceback_without_secrets(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import apportion.cli as cli\n"
        "def broken(words):\n    raise RuntimeError('lost ' + __import__('os').environ['MY_ACCESS_TOKEN'])\n"
        "cli.COMMANDS['plan'] = cli.Command('', broken)\n"
        "cli.main(['plan', 'api_key=SEKRIT1'])\n"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "MY_ACCESS_TOKEN": "plain SEKRIT words", "PYTHONPATH": root}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and f"RuntimeError: lost {GONE}" in ended.stderr
    assert "SEKRIT" not in ended.stderr + ended.stdout
