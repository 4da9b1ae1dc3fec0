"""A run's folder is data: what its configuration names is not imported, run or contacted unless the run is the user's own."""

import copy
import dataclasses
import functools
import json
import shutil
import sys
import typing
from pathlib import Path

import pytest
import yaml

from apportion import build as real_build
from apportion.algorithms.registry import KINDS
from apportion.cli import compose_config, main, to_config
from apportion.conf import trust
from apportion.conf.preference_schema import STAGES
from apportion.conf.schema import Config
from apportion.conf.trust import SHIPPED, uses
from apportion.data.functions import load_function
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import ConfigError
from apportion.platform.runs import RunFolder
from apportion.saved import open_saved, refuse_foreign_folder

EXPERIMENTS = sorted(file.stem for file in (Path(trust.__file__).parent / "experiment").glob("*.yaml"))
CANARY = "from pathlib import Path\nPath('owned').write_text('')\ndef f(*a, **k):\n    return []\n"


@pytest.fixture(autouse=True)
def in_a_folder_with_a_canary(tmp_path, monkeypatch):
    """Whoever imports `canary` or runs `canary.py` leaves a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "canary.py").write_text(CANARY)
    yield
    for name in [name for name in sys.modules if "canary" in name]:
        del sys.modules[name]


@functools.cache
def _composed(stage):
    first = ["model.path=builtin:tiny", "data.train=pairs.jsonl"] if stage else ["experiment=tiny_grpo"]
    return to_config(compose_config(first, stage=stage))[1]


def composed(stage=None):
    """The configuration of a run with built-in parts alone."""
    return copy.deepcopy(_composed(stage))


def changed(resolved, key, value):
    """`resolved` with the value at a dotted key."""
    inside = resolved
    *sections, last = key.split(".")
    for name in sections:
        inside = inside[name]
    inside[last] = value
    return resolved


def given(resolved, name="given"):
    """The folder of a run that somebody else made."""
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    with CheckpointStore(folder / "checkpoints").writing(2) as inside:
        RunState(2, 2, {"seed": 0}).save(inside)
    return folder


def nothing_ran():
    return not Path("owned").exists() and "canary" not in sys.modules


HIDDEN_REWARD = "apportion.algorithms.credit.hidden_reward:HiddenReward"  # makes another part of its argument `base`
KINDS_OF_USE = [
    ("data.train", "function:canary:f", "data.train"),
    ("data.eval", [{"source": "function:os:system", "command": "id > owned"}], "data.eval.0.source"),
    ("data.eval", {"source": "function:canary.py:f"}, "data.eval.source"),
    ("data.eval", ["arithmetic", "function:apportion.data.functions:load_function"], "data.eval.1"),
    ("data.eval", "function:apportion.before:subprocess.getoutput", "data.eval"),
    ("data.eval", [{"source": f"function:{HIDDEN_REWARD}", "base": {"name": "canary.f"}}], "data.eval.0.source"),
    ("reward.functions", "canary:f", "reward.functions"),
    ("reward.functions", [{"function": HIDDEN_REWARD, "params": {"base": {"name": "canary.f"}}}], "reward.functions.0.function"),
    ("reward.functions", [{"function": "canary.py:f"}], "reward.functions.0.function"),
    ("reward.functions", ["exact_match", "os.system"], "reward.functions.1"),
    ("reward.functions", "http://example.com/x", "reward.functions"),
    ("reward.functions", {"urls": ["https://example.com"]}, "reward.functions.urls.0"),
    ("reward.functions", {"urls": "https://example.com"}, "reward.functions.urls"),
    ("reward.functions", [{"function": "exact_match", "auth_env": "HOME"}], "reward.functions.0.auth_env"),
    ("reward.functions", [{"function": "model:m", "params": {"trust_remote_code": 1}}], "reward.functions.0.params.trust_remote_code"),
    ("reward.functions", "gym", "reward.functions"),
    ("environment.cls", "canary:f", "environment.cls"),
    ("environment", {"cls": HIDDEN_REWARD, "params": {"base": {"name": "canary.f"}}}, "environment.cls"),
    ("environment", {"cls": "gymnasium", "params": {"id": "canary:f"}}, "environment.params.id"),
    ("environment", {"cls": "gymnasium", "params": {"id": "A-v1", "observe": "canary.f"}}, "environment.params.observe"),
    ("environment", {"cls": "gymnasium", "params": {"id": "A-v1", "make": {"a": ["canary:f"]}}}, "environment.params.make.a.0"),
    ("environment", {"cls": "textarena", "params": {"id": "A-v0", "opponent": "canary:f"}}, "environment.params.opponent"),
    ("model.trust_remote_code", True, "model.trust_remote_code"),
    ("algorithm.credit", {"name": "canary:f"}, "algorithm.credit.name"),
    ("algorithm.credit", {"name": "macro_actions", "estimator": {"name": "canary.f"}}, "algorithm.credit.estimator.name"),
    ("algorithm.credit", {"name": "macro_actions", "termination": {"name": "parsing", "parser": "canary:f"}},
     "algorithm.credit.termination.parser"),
    ("algorithm.surrogate", {"name": "canary:f"}, "algorithm.surrogate.name"),
    ("algorithm.reduction", {"name": "canary:f"}, "algorithm.reduction.name"),
    ("algorithm.distillation", {"name": "canary:f"}, "algorithm.distillation.name"),
    ("algorithm.shaping", [{"name": "canary:f"}], "algorithm.shaping.0.name"),
    ("algorithm.selection", [{"name": "canary:f"}], "algorithm.selection.0.name"),
    ("judge.function", "canary.py:f", "judge.function"),
    ("judge.function", HIDDEN_REWARD, "judge.function"),
    ("judge.url", "http://example.com/v1", "judge.url"),
    ("judge.url", ["http://example.com/v1", "http://example.com/v2"], "judge.url.0"),
    ("judge.api_key_env", "HOME", "judge.api_key_env"),
    ("judge.cache_folder", "/elsewhere", "judge.cache_folder"),
    ("cluster.address", "ray://example.com:10001", "cluster.address"),
    ("tracking.wandb", "online", "tracking.wandb"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "named"), KINDS_OF_USE, ids=lambda value: str(value)[:60])
def test_each_kind_of_value_is_named(key, value, named):
    resolved = composed()
    assert list(uses(resolved)) == []
    if key == "environment":
        value = resolved["environment"] | value
    assert next(uses(changed(resolved, key, value))).key == named


@pytest.mark.parametrize("words", [["evaluate", "./given"], ["train", "resume=./given"], ["plan", "resume=./given"]])
def test_no_command_runs_any_of_them(words, build, capsys):
    resolved = changed(composed(), "reward.functions", "canary.py:f") | {"trust_run": True}
    changed(resolved, "model.trust_remote_code", True)
    changed(resolved, "environment.cls", "canary:f")
    given(changed(resolved, "algorithm.credit", {"name": "canary:f"}))
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "error: trust_run: got false with given/config.yaml: reward.functions imports and calls canary.py:f; environment.cls "
        "imports and calls canary:f; model.trust_remote_code runs the code of model folders: true; algorithm.credit.name imports "
        "and calls canary:f; its config.yaml has no signature: somebody else or an earlier version of apportion wrote it; "
        "expected a run that you made in this place: look at these values, and if you trust them, add trust_run=true\n"
    )
    assert nothing_ran() and build.calls == []


@pytest.mark.parametrize(
    ("words", "split", "source"),
    [
        (["evaluate", "./given"], "eval", {"source": "function:os:system", "command": "id > owned"}),
        (["train", "resume=./given"], "train", {"source": "function:subprocess:getoutput", "cmd": "id > owned"}),
        (["plan", "resume=./given"], "train", {"source": "function:canary:f"}),
    ],
)
def test_a_command_in_a_source_is_not_run(words, split, source, build, capsys):
    given(changed(composed(), f"data.{split}", [source]))
    assert main(words) == 2
    assert f": data.{split}.0.source imports and calls {source['source']}; " in capsys.readouterr().err
    assert nothing_ran() and build.calls == []


@pytest.mark.parametrize("stage", list(STAGES))
def test_no_preference_stage_runs_any_of_them(stage, capsys):
    resolved = changed(composed(stage), "model.trust_remote_code", True)
    given(changed(changed(resolved, "data.train", "function:canary:f"), "data.eval", ["function:canary.py:f"]))
    assert main([stage.replace("_", "-"), "resume=./given"]) == 2
    error = capsys.readouterr().err
    for named in ("data.train imports", "data.eval.0 imports", "model.trust_remote_code runs"):
        assert named in error
    assert nothing_ran()


def test_what_no_configuration_can_mean_is_left_to_the_checks_that_name_it():
    odd = {
        "reward": {"functions": [None, 5, {"function": 5}, {}]},
        "judge": 5,
        "data": {"eval": [[], 1]},
        "before": None,
    }
    assert list(uses(odd, before=True)) == []


def test_a_reduction_of_sft_is_a_part_as_any_other():
    resolved = composed("sft")
    assert list(uses(resolved)) == []
    assert next(uses(changed(resolved, "sft.reduction", {"name": "canary:f"}))).key == "sft.reduction.name"


def test_an_entry_point_that_a_folder_chooses_is_named(monkeypatch):
    from types import SimpleNamespace

    points = {"apportion.credit": [SimpleNamespace(name="mine"), SimpleNamespace(name="grpo")]}
    monkeypatch.setattr(trust, "entry_points", lambda group: points.get(group, []))
    resolved = composed()
    assert list(uses(resolved)) == []
    assert next(uses(changed(resolved, "algorithm.credit", {"name": "mine"}))).key == "algorithm.credit.name"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_of_a_shipped_recipe_needs_no_trust(experiment):
    resolved = to_config(compose_config([f"experiment={experiment}", "resume=given"]))[1]
    assert list(uses(resolved)) == []


def test_a_part_may_be_named_by_its_path_as_a_part_alone():
    resolved = changed(composed(), "algorithm.credit", {"name": HIDDEN_REWARD, "base": {"name": "grpo"}})
    assert list(uses(resolved)) == []


@pytest.mark.parametrize("key", ["model.path", "critic.model", "reference.model", "teachers.dpo", "judge.model"])
def test_who_allows_code_does_not_mean_that_of_a_model_which_the_folder_chose(key):
    resolved = changed(changed(composed(), key, "theirs"), "model.trust_remote_code", True)
    words = ["model.trust_remote_code=true"]
    left = [use.key for use in uses(resolved) if not use.typed(words)]
    assert left == [key]
    assert [use for use in uses(resolved) if not use.typed([*words, f"{key}=theirs"])] == []


def test_what_is_shipped_exists_and_is_a_function_or_class_of_this_package():
    for name in SHIPPED:
        assert load_function(name).__module__.startswith("apportion.")


def test_a_run_of_built_in_parts_is_evaluated_and_goes_on(build):
    given(composed())
    assert main(["evaluate", "./given"]) == 0
    assert main(["train", "resume=./given"]) == 0
    assert [call[0] for call in build.calls] == ["evaluate", "train"]


def test_the_users_own_run_goes_on_until_it_is_copied_or_edited(build, capsys):
    Path("canary.py").write_text("def f(completions, **columns):\n    return [0.0] * len(completions)\n")
    own = given({}, "runs/first")
    RunFolder(own).save_config(changed(composed(), "reward.functions", "canary.py:f"))
    for words in (["train", "resume=first"], ["evaluate", "runs/first"]):
        assert main(words) == 0, capsys.readouterr().err
    shutil.copytree(own, "runs/second")
    assert main(["evaluate", "second"]) == 2
    assert "its signature is of another user, folder or text" in capsys.readouterr().err
    (own / "config.yaml").write_text((own / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert main(["train", "resume=first"]) == 2
    assert len(build.calls) == 2


def test_trust_is_said_on_the_command_line_for_one_command(build):
    Path("canary.py").write_text("def f(completions, **columns):\n    return [0.0] * len(completions)\n")
    folder = given(changed(composed(), "reward.functions", "canary.py:f") | {"trust_run": True})
    assert main(["train", "resume=./given"]) == 2
    assert main(["train", "resume=./given", "trust_run=true"]) == 0
    assert main(["evaluate", "./given", "trust_run=yes"]) == 0
    RunFolder(folder).save_config(build.calls[0][2])
    assert yaml.safe_load((folder / "config.yaml").read_text())["trust_run"] is False


@pytest.mark.parametrize(
    ("word", "typed"),
    [
        ("reward.functions.0.function=canary.py:f", True),
        ("reward.functions=[{function: canary.py:f}]", True),
        ("++reward.functions=[{function: canary.py:f}]", True),
        ("reward.functions.0.function=${judge.function}", False),
        ("reward.functions=[{function: other.py:f}]", False),  # were it merged, the function would be the folder's
        ("reward.functions.0={weight: 2}", False),
        ("reward.functions.0.weight=2", False),
        ("~reward.functions.0", False),
        ("judge.function=canary.py:f", False),
    ],
)
def test_what_the_command_line_says_itself_is_the_users_own(word, typed):
    use = trust.Use("reward.functions.0.function", "canary.py:f", "imports and calls")
    assert use.typed(["seed=1", word]) is typed


def test_the_command_line_replaces_what_a_folder_says(build, capsys):
    resolved = changed(composed(), "reward.functions", [{"function": "os:system"}])
    given(changed(resolved, "model.trust_remote_code", True))
    assert main(["evaluate", "./given", "reward.functions=[canary.py:f]", "model.trust_remote_code=false"]) == 0
    assert main(["evaluate", "./given", "judge.function=${reward.functions.0.function}", "model={dtype: float32}"]) == 2
    error = capsys.readouterr().err
    for named in ("reward.functions.0.function imports", "model.trust_remote_code runs", "judge.function imports"):
        assert named in error
    assert len(build.calls) == 1 and nothing_ran()


@pytest.mark.parametrize(
    ("key", "value"),
    [("hydra", {"callbacks": {"x": {"_target_": "canary.f"}}}), ("defaults", [{"override hydra/launcher": "x"}])],
)
def test_a_configuration_with_orders_for_hydra_is_refused_even_where_it_is_trusted(key, value, build, capsys):
    RunFolder(given({})).save_config(composed() | {key: value})
    assert main(["evaluate", "./given", "trust_run=true"]) == 2
    assert f"given/config.yaml: got the key {key}, which no run saves" in capsys.readouterr().err
    assert nothing_ran() and build.calls == []


def test_stages_of_a_folder_are_not_run_by_taking_resume_away(build, capsys):
    given(changed(composed(), "before", ["sft run_name=a data.train=function:canary:f"]))
    assert main(["train", "resume=./given"]) == 0  # a run that goes on has run them
    assert main(["train", "resume=./given", "++resume=null"]) == 2
    assert ": before.0 runs apportion sft run_name=a" in capsys.readouterr().err
    assert len(build.calls) == 1 and nothing_ran()


def test_a_foreign_folder_does_not_say_where_this_users_runs_are(build):
    given(composed() | {"runs_folder": "/elsewhere"}, "runs/first")
    assert main(["train", "resume=first"]) == 0
    assert build.calls[0][1].runs_folder == "runs"


def test_a_long_list_and_a_secret_in_it_are_shortened():
    functions = ["http://me:PASSWORD@example.com/x", *(f"canary:f{i}" for i in range(60))]
    resolved = changed(composed(), "reward.functions", functions)
    with pytest.raises(ConfigError) as refused:
        open_saved(given(resolved) / "config.yaml").refuse_foreign(resolved, [])
    said = str(refused.value)
    assert "and 41 more; " in said and "PASSWORD" not in said and len(said) < 3000


def test_show_runs_nothing(capsys):
    folder = given({"reward": {"functions": "canary.py:f"}, "data": {"eval": "function:os:system"}, "hydra": {"x": 1}})
    line = {
        "step": 1,
        "prompt": "p",
        "reward": 1,
        "finish_reason": "stop",
        "policy_version": 0,
        "tokens": ["a"],
        "advantages": [1.0],
    }
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["show", "./given"]) == 0
    assert (folder / "tokens.html").is_file() and nothing_ran()


def test_links_that_lead_out_of_a_foreign_folder_are_refused_where_a_command_writes(tmp_path):
    folder, outside = given(composed()), tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.log").write_text("mine")
    (folder / "checkpoints" / "step-000002" / "model").symlink_to(outside)  # it is only read
    (folder / "wandb").mkdir()
    (folder / "wandb" / "latest").symlink_to("../wandb")  # it stays inside
    refuse_foreign_folder(folder, trusts=False)
    (folder / "logs").symlink_to(outside)
    for writes in ("", "logs"):
        with pytest.raises(ConfigError, match=rf"given/config\.yaml: logs is a link to {outside}; "):
            refuse_foreign_folder(folder, False, writes)
    refuse_foreign_folder(folder, trusts=True)
    (folder / "logs").unlink()
    (folder / "plots").mkdir()
    (folder / "plots" / "reward.png").symlink_to(outside / "precious.log")
    with pytest.raises(ConfigError, match=r"plots/reward\.png is a link"):
        refuse_foreign_folder(folder, False)
    refuse_foreign_folder(folder, False, "logs")
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code runs the code in its models"):
        refuse_foreign_folder(folder, False, "logs", code=True)
    RunFolder(folder).save_config(composed())  # the user's own may lie on another disk
    refuse_foreign_folder(folder, False)


def test_train_and_evaluate_look_at_the_folder_under_a_recipe_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(real_build, "Cluster", lambda *_: pytest.fail("actors were started"))
    folder = given({"seed": 0})
    for name in ("checkpoints", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).symlink_to(tmp_path)
    assert main(["train", "experiment=tiny_grpo", "resume=./given"]) == 2
    assert "checkpoints is a link to" in capsys.readouterr().err
    (folder / "checkpoints").unlink()
    given({"seed": 0})
    assert main(["evaluate", "./given", "experiment=tiny_grpo"]) == 2
    assert "logs is a link to" in capsys.readouterr().err


JUDGED = {
    "before", "cluster.address", "data.eval", "data.train", "environment.cls", "environment.params", "judge.api_key_env",
    "judge.cache_folder", "judge.function", "judge.url", "reward.functions", "sft.reduction", "tracking.wandb",
    "tracking.wandb_entity", *(f"algorithm.{kind}" for kind in KINDS),
}  # fmt: skip
DATA = {  # texts and free values that name columns, files of data, models without code, or one of a few words
    "algorithm.name", "algorithm.kl.estimator", "algorithm.kl.place", "algorithm.correction.level",
    "algorithm.correction.method", "cluster.weight_transfer", "critic.model", "critic.schedule", "data.chat_template_kwargs",
    "data.chosen_column", "data.completion_column", "data.label_column", "data.margin_column", "data.messages_column",
    "data.on_bad_row", "data.prompt_column", "data.rejected_column", "data.system_prompt", "data.too_long",
    "data.tools_column", "dpo.loss", "dpo.reference", "environment.observation_role", "judge.answer_column",
    "judge.delimiter", "judge.dtype", "judge.engine", "judge.model", "model.attention", "model.chat_template",
    "model.dtype", "model.path", "policy.lora.targets", "policy.schedule", "recipe", "reference.model", "resume",
    "reward.step_delimiter", "rollout.engine", "rollout.response_column", "rollout.stop", "run_name", "runs_folder",
    "teachers.dpo", "teachers.other", "tracking.wandb_project", "tracking.wandb_tags", "train.sync_unproved",
}  # fmt: skip


def free_keys(kind, prefix=""):
    """Dotted keys of the schema whose values can hold text."""
    for name, hint in typing.get_type_hints(kind).items():
        kinds = [hint, *typing.get_args(hint)]
        section = next((part for part in kinds if dataclasses.is_dataclass(part)), None)
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        if section is not None:
            yield from free_keys(section, f"{prefix}{name}.")
        elif any(part in (str, typing.Any) or typing.get_origin(part) in (dict, list) for part in kinds):
            yield prefix + name


def test_every_text_of_the_schema_is_either_looked_at_or_known_to_be_data():
    """A new key has to be put into one of the two."""
    keys = {key for kind in (Config, *STAGES.values()) for key in free_keys(kind)} - {"evaluation.k"}
    assert keys == JUDGED | DATA
