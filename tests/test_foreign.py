"""Run folders that somebody else made or that are damaged: one line with file and value, and nothing through a link."""

import json
import os
import pickle
import time

import pytest

from apportion.cli import main
from apportion.platform.checkpoint import CheckpointStore, RunState, problem_of
from apportion.platform.errors import ApportionError, CheckpointError, ConfigError
from apportion.platform.foreign import checked_yaml, open_to_append, read_json
from apportion.platform.messages import brief, quoted
from apportion.platform.run_lock import held
from apportion.platform.runs import find_checkpoint, named_run
from apportion.platform.token_page import TOKENS_SHOWN, write_token_page
from apportion.platform.tracking import JsonlTracker, read_metrics
from apportion.saved import read_saved

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 6)
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 3000 + "]" * 3000, "line 1: lists and mappings are nested more than 100 deep"),
        ("a: &a [*a]\n", r"line 1: alias \*a is inside of what it repeats"),
        (BOMB, r"more than 100,000 values, aliases included"),
        ("x" * (2**20 + 1), "it has more than 1,048,576 bytes"),
    ],
)
def test_a_configuration_that_would_not_end_is_refused_at_once(tmp_path, text, line):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"config\.yaml: got a file that cannot be read \(.*{line}"):
        read_saved(file)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("~: 1\n", "got the key None in it, expected text"),
        ("a: [1" + "0" * 400 + "]\n", "a: got 1000.*, expected a number"),
    ],
)
def test_a_key_or_number_that_no_configuration_has_is_named(tmp_path, text, line):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {line}"):
        read_saved(tmp_path / "config.yaml")


def test_an_alias_that_repeats_little_is_read_as_what_it_repeats(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_saved(tmp_path / "config.yaml") == {"a": [1, 2], "b": [1, 2]}
    assert checked_yaml("a: &a 1\nb: *a\n") == "a: &a 1\nb: *a\n"


def write(root, *steps):
    store = CheckpointStore(root, keep=5)
    for step in steps:
        with store.writing(step) as folder:
            RunState(step, step, {}).save(folder)
    return store


def change_manifest(folder, **values):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"files": {}}, r"it lists 0 files and no state.json among them"),
        ({"step": 7}, r"it is of step 7, and the folder of step 2"),
        ({"step": True}, r"got no such values .* for step"),
        ({"written_at": 10**400}, r"got no such values .* for written_at"),
        ({"written_at": float("nan")}, r"got no such values .* for written_at"),
        ({"files": {"../state.json": {"size": 1, "blake2b": "x"}}}, r"got no such values .* for \.\./state\.json"),
    ],
)
def test_a_manifest_that_no_run_writes_is_no_whole_checkpoint(tmp_path, values, problem):
    import re

    write(tmp_path, 2)
    change_manifest(tmp_path / "step-000002", **values)
    assert re.search(problem, problem_of(tmp_path / "step-000002") or "")


@pytest.mark.parametrize(
    "damage", [lambda f: (f / "state.json").write_text("{}"), lambda f: (f / "manifest.json").unlink()]
)
def test_a_damaged_newest_checkpoint_is_named_when_an_older_one_is_taken(tmp_path, damage, capsys):
    run = tmp_path / "runs" / "a"
    write(run / "checkpoints", 2, 4)
    (run / "config.yaml").write_text("seed: 1\n")
    damage(run / "checkpoints" / "step-000004")
    assert find_checkpoint("a", tmp_path / "runs").step == 2
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {run}/checkpoints/step-000004: ")
    assert said.endswith("; taking step-000002 instead, the newest that is whole\n")
    write(tmp_path / "runs" / "b" / "checkpoints", 2, 4)
    (tmp_path / "runs" / "b" / "config.yaml").write_text("seed: 1\n")
    assert find_checkpoint("b", tmp_path / "runs").step == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", "got a list, expected the state of a run, a mapping"),
        ("null", "got a NoneType"),
        ("[" * 100_000, "cannot be read .*nested too deep"),
        (json.dumps({"step": "3"}), "step: got '3', expected a whole number from 0"),
        (json.dumps({"trackers": []}), r"trackers: got \[\], expected a mapping of mappings"),
        (json.dumps({"kl": {"coefficient": "x"}}), "kl: got .*, expected null or a mapping of numbers"),
    ],
)
def test_a_state_of_the_wrong_type_is_named(tmp_path, text, line):
    RunState(1, 1, {}).save(tmp_path)
    file = tmp_path / "state.json"
    changed = json.loads(text) if text.startswith("{") else None
    file.write_text(text if changed is None else json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(CheckpointError, match=rf"state\.json: {line}"):
        RunState.load(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="no regular file"):
        read_json(tmp_path / "manifest.json")
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ApportionError, match=r"metrics\.jsonl: got no regular file"):
        JsonlTracker(tmp_path, resume_step=1)


def test_nothing_is_written_through_a_link(tmp_path):
    precious, run = tmp_path / "precious", tmp_path / "run"
    run.mkdir()
    precious.write_text("mine")
    for name in (".lock", "metrics.jsonl", "tokens.html"):
        (run / name).symlink_to(precious)
    with pytest.raises(ApportionError, match=r"\.lock: got a link, expected a regular file"), held(run):
        pass
    with pytest.raises(ApportionError, match=r"metrics\.jsonl: got a link"):
        open_to_append(run / "metrics.jsonl")
    (run / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    write_token_page(run)
    assert precious.read_text() == "mine"
    assert not (run / "tokens.html").is_symlink()


def test_metrics_that_are_no_numbers_are_named_by_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": "x"}\n{"step": 3}\n')
    with pytest.raises(ApportionError, match=r"metrics\.jsonl:2: .*loss is no number: 'x'"):
        read_metrics(tmp_path)


SAMPLE = {
    "step": 1, "prompt": "1 + 1?", "reward": 1.0, "finish_reason": "stop", "policy_version": 0, "tokens": ["a", "b"],
    "advantages": [0.5, -1.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff\xfe", "'utf-8' codec"),
        (b"[1]", "a list"),
        (json.dumps(SAMPLE | {"tokens": None}).encode(), "tokens: got None, expected a list of texts"),
        (json.dumps(SAMPLE | {"advantages": [1.0]}).encode(), "advantages: got 1, expected one for each of 2 tokens"),
        (json.dumps(SAMPLE | {"reward": 10**400}).encode(), "reward: got 1000.*, expected a number or null"),
        (json.dumps(SAMPLE | {"step": "1"}).encode(), "no step"),
    ],
)
def test_a_sample_that_no_run_writes_is_named_by_line(tmp_path, line, message):
    (tmp_path / "samples.jsonl").write_bytes(
        json.dumps(SAMPLE).encode() + b"\n" + line + b"\n" + json.dumps(SAMPLE).encode()
    )
    with pytest.raises(ApportionError, match=rf"samples\.jsonl:2: .*{message}"):
        write_token_page(tmp_path)


def test_the_page_shows_hidden_signs_by_their_code_and_leaves_the_rest_of_a_long_sample_out(tmp_path):
    long = SAMPLE | {"tokens": ["\0\x1b[2J", "\u202e", "c\u200dd"] + ["t"] * 50_000, "advantages": None}
    (tmp_path / "samples.jsonl").write_text(json.dumps(long) + "\n")
    page = write_token_page(tmp_path).read_text()
    assert "<span>\\x00\\x1b[2J</span><span>\\u202e</span><span>c\u200dd</span>" in page
    assert page.count("<span>t</span>") == TOKENS_SHOWN - 3
    assert f"... {50_003 - TOKENS_SHOWN:,} more tokens are not shown" in page


def test_a_run_without_a_configuration_says_what_is_missing(tmp_path, capsys):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert main(["show", "first"]) == 2
    assert capsys.readouterr().err == (
        "error: show: got runs/first, in which there is no config.yaml, expected the folder of a run, which keeps its "
        "configuration there: copy the config.yaml of the run that wrote it, or name another run\n"
    )
    with pytest.raises(ConfigError, match=r"neither a config\.yaml nor a folder checkpoints"):
        named_run("first", tmp_path / "runs")


def test_a_foreign_configuration_cannot_steer_the_terminal(tmp_path, capsys):
    from apportion.cli import compose_config, to_config
    from apportion.platform.runs import RunFolder

    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    resolved = to_config(compose_config(["experiment=tiny_grpo"]))[1]
    RunFolder(folder).save_config(resolved | {"recipe": "\x1b]0;owned\x07mine"})
    assert main(["plan", "resume=first"]) == 0
    assert capsys.readouterr().out.startswith("mine: grpo on ")


def test_a_long_value_is_quoted_by_its_ends():
    assert quoted("y" * 5000) == "'" + "y" * 79 + "...(5,002 characters)..." + "y" * 39 + "'"
    assert brief("model.path: got /a/b, expected c") == "model.path: got /a/b, expected c"
    assert len(brief("model.path: got " + "y " * 5000)) < 5000


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (pickle.dumps(os.system, protocol=2), "got a pickle that holds code \\(posix.system\\)"),
        (b"garbage", "got a pickle that is damaged or holds code"),
        (b"", "got a file that ends early"),
        (b"PK\x03\x04aaaa", "got a damaged archive"),
    ],
)
def test_a_file_that_holds_code_or_is_damaged_is_refused_without_advice_to_run_it(tmp_path, content, line):
    import torch

    from apportion.actors.loading import tensors_only

    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights\.pt: {line}") as error, tensors_only(str(file)):
        torch.load(file, weights_only=True)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:99]), lambda f: f.write_bytes(b"")])
def test_damaged_random_states_are_named(tmp_path, damage):
    from apportion.platform.random_states import load_random_states, save_random_states

    damage(save_random_states(tmp_path, "driver"))
    with pytest.raises(CheckpointError, match=r"random-driver\.npz: cannot be read"):
        load_random_states(tmp_path, "driver")
