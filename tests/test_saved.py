"""What a saved configuration keeps and has lost, and how a command that takes it up is told."""

import pytest

from apportion.cli import compose_config, main, to_config
from apportion.platform.errors import ConfigError
from apportion.platform.runs import RunFolder, make_run_folder
from apportion.saved import read_saved, refuse_foreign_folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose reward function and first stage had a secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    resolved = to_config(compose_config(["experiment=quickstart"]))[1]
    resolved["reward"]["functions"] = [{"function": "mine.py:reward", "params": {"api_key": "<redacted>"}}]
    (tmp_path / "mine.py").write_text("def reward(completions, api_key, **columns):\n    return 0.0\n")
    resolved["before"] = ["dpo run_name=a +data.token=<redacted>"]
    folder = tmp_path / "runs" / "first"
    (folder / "checkpoints" / "step-000010" / "model").mkdir(parents=True)
    RunFolder(folder).save_config(resolved)
    return folder


@pytest.mark.parametrize("words", [["train", "resume=first"], ["plan", "resume=first"], ["evaluate", "first"]])
@pytest.mark.slow
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


@pytest.mark.parametrize(
    "text", ["costs ${price} now", "${oc.env:HOME}", r"a \${b} \\${c}", "${", "$ {}", r"ends with \\"]
)
@pytest.mark.slow
def test_a_text_with_a_dollar_and_a_brace_is_the_same_text_when_the_run_goes_on(text, tmp_path, monkeypatch, build):
    monkeypatch.chdir(tmp_path)
    resolved = to_config(compose_config(["experiment=quickstart"]))[1]
    resolved["data"]["system_prompt"] = text
    (tmp_path / "mine.py").write_text("def reward(completions, note, **columns):\n    return 0.0\n")
    resolved["reward"]["functions"] = [{"function": "mine.py:reward", "params": {"note": [text]}}]
    folder = make_run_folder(tmp_path / "runs", "first", "q")
    folder.save_config(resolved)
    assert main(["train", "resume=first"]) == 0
    _, config, again = build.calls[0]
    assert config.data.system_prompt == again["data"]["system_prompt"] == text
    assert config.reward.functions[0]["params"]["note"] == [text]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\n  train: 2\n", "got a file that is no YAML (mapping values are not allowed here in "),
        ("- 1\n", "got a list, expected a run's configuration, a mapping: correct it\n"),
    ],
)
@pytest.mark.parametrize("words", [["train", "resume=first"], ["evaluate", "first"]])
@pytest.mark.slow
def test_a_configuration_that_was_spoilt_by_hand_is_named_in_one_line(words, text, line, run, build, capsys):
    (run / "config.yaml").write_text(text)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"runs/first/config.yaml: {line}" in error
    assert build.calls == []


def test_a_key_that_the_schema_does_not_have_is_of_the_runs_file(run, build, capsys):
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "stepz: 1\n")
    assert main(["train", "resume=first"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: the run's config.yaml: stepz: got an unknown key, expected a key that exists"
    )


@pytest.mark.parametrize("line", ["password: [Nz7oyDDHDsZGay0z", "api_key: 'Nz7oyDDHDsZGay0z", "seed: 1\n  http://u:Nz7oyDDHDsZGay0z@h: [", "'Nz7oyDDHDsZGay0z': b: c"])  # fmt: skip
def test_the_line_that_is_no_yaml_is_named_and_not_quoted(line, tmp_path):
    (tmp_path / "config.yaml").write_text(f"seed: 0\n{line}\n")
    with pytest.raises(
        ConfigError, match=r"got a file that is no YAML \(.* in line \d, column \d+\), expected"
    ) as raised:
        read_saved(tmp_path / "config.yaml")
    assert "Nz7oyDDH" not in str(raised.value)


def test_a_folder_without_a_configuration_is_foreign(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    refuse_foreign_folder(run, trusts=False)  # nothing in it leads out
    (run / "logs").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"logs is a link to .*; it has no config\.yaml"):
        refuse_foreign_folder(run, trusts=False)
