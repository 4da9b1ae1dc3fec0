"""Run folders: exclusive, without secrets, and found again by `resume=`."""

import json
import re
import shutil
import threading
from contextlib import nullcontext

import pytest
import yaml

from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import CheckpointError, ConfigError
from apportion.platform.files import write_text_atomically
from apportion.platform.known_secrets import redacted, redacted_text
from apportion.platform.run_lock import held
from apportion.platform.runs import find_checkpoint, make_run_folder, run_of
from apportion.saved import saved_config


def checkpoint(run, step):
    with CheckpointStore(run.checkpoints).writing(step) as folder:
        RunState(step=step, policy_version=step, data={}).save(folder)


def test_a_name_is_made_of_recipe_time_and_a_random_tail(tmp_path):
    run = make_run_folder(tmp_path / "runs", None, "math/quick start")
    assert re.fullmatch(r"math-quick-start-\d{8}-\d{6}-[0-9a-f]{6}", run.name)
    assert run.path.parent == tmp_path / "runs"


def test_many_runs_at_once_get_folders_of_their_own(tmp_path):
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(make_run_folder(tmp_path, None, "q").name)) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(set(made)) == 40


def test_a_taken_name_is_refused_with_the_two_ways_out(tmp_path):
    make_run_folder(tmp_path, "mine", "q")
    with pytest.raises(ConfigError, match=r"run_name: got 'mine'.*expected a new name, or resume=mine"):
        make_run_folder(tmp_path, "mine", "q")


def failed_start(tmp_path, jsonl=True):
    run = make_run_folder(tmp_path, "mine", "q")
    with held(run.path):
        run.save_config({"tracking": {"jsonl": jsonl}})
    (run.path / "metrics.jsonl").write_text("")
    (run.path / "logs").mkdir()
    (run.path / "logs" / "policy-0.log").write_text("no GPU\n")
    return run


def test_the_folder_of_a_start_that_failed_is_taken_over_once(tmp_path):
    run = failed_start(tmp_path)
    assert make_run_folder(tmp_path, "mine", "q").path == run.path
    assert sorted(entry.name for entry in run.path.iterdir()) == [".lock", "logs"]
    with pytest.raises(ConfigError, match="got 'mine', which"):  # of a second start, before the first has its lock
        make_run_folder(tmp_path, "mine", "q")


def test_of_starts_that_take_over_a_folder_at_once_one_gets_it(tmp_path):
    failed_start(tmp_path)
    outcomes = []

    def start():
        try:
            outcomes.append(make_run_folder(tmp_path, "mine", "q").name)
        except ConfigError:
            outcomes.append(None)

    threads = [threading.Thread(target=start) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [None] * 19 + ["mine"]


@pytest.mark.parametrize("left", ["metrics", "checkpoint", "summary", "no jsonl", "running", "no run", "no locks"])
def test_a_folder_that_holds_a_run_or_may_hold_one_is_not_taken_over(tmp_path, left, monkeypatch):
    run = failed_start(tmp_path, jsonl=left != "no jsonl")
    if left == "metrics":
        (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    elif left == "checkpoint":
        checkpoint(run, 1)
    elif left == "summary":
        run.write_summary({})
    elif left == "no run":
        (run.path / "config.yaml").write_text("theme: dark\n")
    elif left == "no locks":
        monkeypatch.setattr("apportion.platform.run_lock._locked", lambda file, mode, folder: True)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with (
        held(run.path) if left == "running" else nullcontext(),
        pytest.raises(ConfigError, match="expected a new name"),
    ):
        make_run_folder(tmp_path, "mine", "q")
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "two words"])
def test_a_name_that_is_no_folders_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="run_name: got"):
        make_run_folder(tmp_path, name, "q")


def test_a_runs_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"runs_folder: got .*which cannot be made"):
        make_run_folder(tmp_path / "runs", None, "q")


def test_secrets_are_taken_out_and_everything_else_stays():
    config = {
        "reward": {
            "functions": [{"api_key": "k-123", "headers": {"Authorization": "Bearer abcdefgh123"}, "weight": 1.0}]
        },
        "wandbApiKey": "x" * 40,
        "hf_token": "plain",
        "password": 1234,
        "client-secret": ["a", "b"],
        "data": {"max_prompt_tokens": 512, "kl_per_token": 0.1, "level": "token", "eos_token": "</s>", "token": None},
        "urls": ["http://me:pw@judge:8000/v1", "http://judge/v1?api_key=abc&n=1"],
        "note": "hf_" + "A" * 20,
    }
    gone = "<redacted>"
    assert redacted(config) == {
        "reward": {"functions": [{"api_key": gone, "headers": {"Authorization": gone}, "weight": 1.0}]},
        "wandbApiKey": gone,
        "hf_token": gone,
        "password": gone,
        "client-secret": gone,
        "data": {"max_prompt_tokens": 512, "kl_per_token": 0.1, "level": "token", "eos_token": "</s>", "token": None},
        "urls": [f"http://{gone}@judge:8000/v1", f"http://judge/v1?api_key={gone}&n=1"],
        "note": gone,
    }
    assert config["hf_token"] == "plain"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WANDB_API_KEY=abc123 python x", "WANDB_API_KEY=<redacted> python x"),
        ("+reward.judge.api_key=abc", "+reward.judge.api_key=<redacted>"),
        ("Authorization: Bearer abc.def", "Authorization: <redacted>"),
        ("algorithm.reduction.name=token_mean", "algorithm.reduction.name=token_mean"),
        ("tokenizer.eos_token=</s>", "tokenizer.eos_token=</s>"),
        ("The password: say friend and enter.", "The password: say friend and enter."),
        ("1 + 1 = 2, a@b.c", "1 + 1 = 2, a@b.c"),
        ("reward.params={api_key: abc, n: 1}", "reward.params={api_key: <redacted>, n: 1}"),
        ("{password: hunter2}", "{password: <redacted>}"),
        ("api_key='a b' x", "api_key='<redacted>' x"),
        ('api_key=\\"a b\\" x', 'api_key=\\"<redacted>\\" x'),
        ('{"token":"abc", "n": 1}', '{"token":"<redacted>", "n": 1}'),
        ("client-secret: 'a b'", "client-secret: '<redacted>'"),
        ("{max_tokens: 8, level: token, token: null}", "{max_tokens: 8, level: token, token: null}"),
        ("https://h/v1?key=AIzaX&n=1", "https://h/v1?key=<redacted>&n=1"),
        ("https://h/f?n=1&sig=a%2B,b;c== x", "https://h/f?n=1&sig=<redacted> x"),
        ("https://h/f?code=abc==#top", "https://h/f?code=<redacted>#top"),
        (
            "https://h?Subscription-Key=a&X-Amz-Signature=b",
            "https://h?Subscription-Key=<redacted>&X-Amz-Signature=<redacted>",
        ),
        ("[http://h?pwd=a, 'http://h?pass=b']", "[http://h?pwd=<redacted>, 'http://h?pass=<redacted>']"),
        ("http://h/?monkey=3&keys=2&zipcode=1", "http://h/?monkey=3&keys=2&zipcode=1"),
        ("http://me:p@ss@h/x/a@b", "http://<redacted>@h/x/a@b"),
        ("is a?key=1 a question", "is a?key=1 a question"),
        ("kl_per_token=0.1 {kl_per_token: 0.1}", "kl_per_token=0.1 {kl_per_token: 0.1}"),
        ("{eos_token: </s>}", "{eos_token: </s>}"),
    ],
)
def test_texts_lose_what_looks_like_a_secret(text, expected):
    assert redacted_text(text) == expected


def test_a_secret_of_the_environment_is_taken_out_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_TOKEN", "correct-horse-battery")
    assert redacted_text("judge at host, correct-horse-battery!") == "judge at host, <redacted>!"


def test_the_saved_configuration_has_no_secret(tmp_path):
    run = make_run_folder(tmp_path, "r", "q")
    run.save_config({"seed": 1, "judge": {"api_key": "abc"}, "layers": (1, 2)})
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {
        "seed": 1,
        "judge": {"api_key": "<redacted>"},
        "layers": [1, 2],
    }


def test_the_summary_is_strict_json(tmp_path):
    run = make_run_folder(tmp_path, "r", "q")
    file = run.write_summary({"accuracy_after": float("nan"), "seconds": {"rollout": 1.5}, "where": tmp_path})
    assert json.loads(file.read_text()) == {
        "accuracy_after": None,
        "seconds": {"rollout": 1.5},
        "where": str(tmp_path),
    }


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text_atomically(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(tmp_path / "a.json", "new \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_resume_takes_a_name_a_folder_or_a_checkpoint(tmp_path, monkeypatch):
    run = make_run_folder(tmp_path / "runs", "first", "q")
    run.save_config({})
    checkpoint(run, 1)
    checkpoint(run, 2)
    monkeypatch.chdir(tmp_path)
    newest = run.checkpoints / "step-000002"
    older = run.checkpoints / "step-000001"
    assert find_checkpoint("first", "runs").path == newest
    assert find_checkpoint("runs/first", "runs").path == newest
    assert find_checkpoint(str(run.path), "elsewhere").path == newest
    assert find_checkpoint(str(older), "runs").path == older
    assert find_checkpoint("runs/first/checkpoints/step-000001/", "runs").step == 1
    assert run_of(find_checkpoint("first", "runs")).path == run.path


@pytest.mark.parametrize("linked", ["runs", "runs/first/checkpoints", "runs/first/checkpoints/step-000002"])
def test_a_checkpoint_is_found_where_its_folders_are_links_to_another_disk(tmp_path, monkeypatch, linked):
    run = make_run_folder(tmp_path / "runs", "first", "q")
    run.save_config({})
    checkpoint(run, 2)
    (tmp_path / linked).rename(tmp_path / "disk")
    (tmp_path / linked).symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    for argument in ("first", "runs/first", "runs/first/checkpoints/step-000002"):
        found = find_checkpoint(argument, "runs")
        assert (found.step, run_of(found).path.resolve()) == (2, run.path.resolve())
        place = saved_config(argument)
        assert place is not None and place.resolve() == (run.path / "config.yaml").resolve()


def test_resume_of_an_unknown_name_says_what_there_is(tmp_path):
    checkpoint(make_run_folder(tmp_path, "quickstart-a", "q"), 1)
    make_run_folder(tmp_path, "empty", "q")
    with pytest.raises(ConfigError) as caught:
        find_checkpoint("quickstrat-a", tmp_path)
    assert str(caught.value) == (
        "resume: got 'quickstrat-a', expected a run's folder or name, or a checkpoint "
        f"(did you mean 'quickstart-a'?); {tmp_path} has quickstart-a"
    )
    with pytest.raises(ConfigError, match=r"no run in .*none has a checkpoint"):
        find_checkpoint("x", tmp_path / "none")


def test_resume_of_a_run_without_a_whole_checkpoint_says_what_was_found(tmp_path):
    run = make_run_folder(tmp_path, "r", "q")
    run.save_config({})
    with pytest.raises(ConfigError, match="found: no checkpoint"):
        find_checkpoint("r", tmp_path)
    checkpoint(run, 4)
    (run.checkpoints / "step-000004" / "state.json").write_text("{}")
    (run.checkpoints / ".step-000005.partial-00ff").mkdir()
    with pytest.raises(ConfigError, match=r"\.step-000005.*half-written; step-000004: state.json: got 2 bytes"):
        find_checkpoint("r", tmp_path)


@pytest.mark.parametrize("place", ["backup", "checkpoints"])
def test_a_checkpoint_outside_a_run_makes_no_run_of_what_it_lies_in(tmp_path, place):
    run = make_run_folder(tmp_path / "runs", "r", "q")
    checkpoint(run, 4)
    run.save_config({})
    copy = tmp_path / "proj" / place / "step-000004"
    shutil.copytree(run.checkpoints / "step-000004", copy)
    if place == "backup":  # a project has a config.yaml of its own
        (tmp_path / "proj" / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(str(copy), tmp_path / "runs")
    assert str(caught.value) == (
        f"checkpoint: got {str(copy)!r}, which lies in no run's folder, expected RUN/checkpoints/step-000004 beside "
        "RUN/config.yaml: lay a copy out so, with the config.yaml of the run that wrote it"
    )
    shutil.copytree(run.path, tmp_path / "laid-out")
    assert find_checkpoint(str(tmp_path / "laid-out" / "checkpoints" / "step-000004"), tmp_path).step == 4


def test_a_folder_with_checkpoints_and_no_configuration_is_no_run(tmp_path):
    checkpoint(make_run_folder(tmp_path, "proj", "q"), 4)
    with pytest.raises(
        ConfigError, match=r"resume: got .*proj, a folder with checkpoints and no config.yaml, expected a"
    ):
        find_checkpoint(str(tmp_path / "proj"), tmp_path)


def test_a_checkpoint_named_outright_must_be_whole(tmp_path):
    run = make_run_folder(tmp_path, "r", "q")
    run.save_config({})
    checkpoint(run, 4)
    (run.checkpoints / "step-000004" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json: missing"):
        find_checkpoint(str(run.checkpoints / "step-000004"), tmp_path)


def test_what_a_prompt_or_pattern_says_of_tokens_is_left_as_it_is():
    config = {
        "data": {"system_prompt": 'Reply as JSON: {"answer": 1, "token": "word"}'},
        "pattern": r'"token":\s*(\w+)',
    }
    assert redacted(config) == config
    words = "dpo run_name=a 'reward.functions=[{params: {api_key: XYZ}}]'"
    assert redacted({"before": [words]}) == {"before": [words.replace("XYZ", "<redacted>")]}
