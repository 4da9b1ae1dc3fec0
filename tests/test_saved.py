"""What a saved configuration has lost, and how a command that takes it up is told."""

import pytest
import yaml

from apportion.cli import compose_config, main, to_config


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose reward function and first stage had a secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    resolved = to_config(compose_config(["experiment=quickstart"]))[1]
    resolved["reward"]["functions"] = [{"function": "mine.py:reward", "params": {"api_key": "<redacted>"}}]
    (tmp_path / "mine.py").write_text("def reward(response, api_key):\n    return 0.0\n")
    resolved["before"] = ["dpo run_name=a +data.token=<redacted>"]
    folder = tmp_path / "runs" / "first"
    (folder / "checkpoints" / "step-000010" / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    return folder


@pytest.mark.parametrize("words", [["train", "resume=first"], ["plan", "resume=first"], ["evaluate", "first"]])
def test_a_secret_that_was_not_saved_has_to_be_given_again(words, run, build, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "error: reward.functions.0.params.api_key: got <redacted>, which stands for a secret in a run's saved "
        "configuration, expected the value itself: give it again on the command line "
        "(reward.functions.0.params.api_key=...)\n"
    )
    assert build.calls == []


def test_given_again_the_run_goes_on_and_no_stage_before_it_is_asked_for_its_own(run, build):
    assert main(["train", "resume=first", "reward.functions.0.params.api_key=mine"]) == 0
    assert build.calls[0][1].reward.functions[0]["params"]["api_key"] == "mine"
