"""The command line's words: the configuration they make, and exact error lines where they make none."""

from pathlib import Path

import pytest
import yaml

from apportion.cli import compose_config, main, to_config
from apportion.conf import schema
from apportion.platform.errors import ConfigError

EXPERIMENTS = ", ".join(sorted(file.stem for file in (Path(schema.__file__).parent / "experiment").glob("*.yaml")))
WHOLE = ["model.path=m", "data.train=t.jsonl", "reward.functions=numeric_match"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


LINES = [
    (["modle.path=x"], "modle.path: got an unknown key, expected a key that exists (did you mean 'model.path'?)"),
    (
        ["policy.learning_rat=1"],
        "policy.learning_rat: got an unknown key, expected a key of policy (did you mean 'policy.learning_rate'?)",
    ),
    (
        ["policy.lora.rnk=4"],
        "policy.lora.rnk: got an unknown key, expected a key of policy (did you mean 'policy.lora.rank'?)",
    ),
    (["+foo.bar=1"], "foo: got an unknown key, expected a key that exists"),
    (
        ["+train.stepz=1"],
        "train.stepz: got an unknown key, expected a key of train (did you mean 'train.steps'?)",
    ),
    (
        ["algorithm.credit.normalise=std"],
        "algorithm.credit.normalise: got an unknown key, expected one of name, normalize, eps under algorithm.credit "
        "(did you mean 'normalize'?)",
    ),
    (
        ["experiment=quickstat"],
        f"experiment: got 'quickstat', expected one of {EXPERIMENTS} (did you mean 'quickstart'?)",
    ),
    (["train.steps=many"], "train.steps: got 'many', expected an integer"),
    (["train.steps=null"], "train.steps: got null, expected an integer"),
    (["train.steps=1.5"], "train.steps: got 1.5, expected an integer"),
    (["policy.learning_rate=fast"], "policy.learning_rate: got 'fast', expected a number"),
    (["train.deterministic=maybe"], "train.deterministic: got 'maybe', expected true or false"),
    (["rollout.stop=a"], "rollout.stop: got 'a', expected a list [a,b]"),
    (["evaluation.k=[a]"], "evaluation.k: got 'a' in the list, expected a list of integers [1,2]"),
    (
        ["train=3"],
        "train: got 3, expected its keys, one by one (steps, prompts_per_step, deterministic, max_minutes, sync_check, "
        "sync_unproved, max_sync_gap)",
    ),
    (["algorithm.credit=grpo"], "algorithm.credit: got 'grpo', expected a mapping {key: value}"),
    (
        ["seed=1"],
        "model.path, data.train, reward.functions: got no value, expected one each; "
        "choose a recipe (experiment=quickstart) or give model.path=...",
    ),
    (
        [*WHOLE[:2]],
        "reward.functions: got no value, expected one; "
        "choose a recipe (experiment=quickstart) or give reward.functions=...",
    ),
    ([*WHOLE, "policy.zero_stage=5"], "policy.zero_stage: got 5, expected 0, 1, 2 or 3"),
    ([*WHOLE, "train.max_sync_gap=0"], "train.max_sync_gap: got 0.0, expected above 0 or null"),
    ([*WHOLE, "train.max_sync_gap=-0.1"], "train.max_sync_gap: got -0.1, expected above 0 or null"),
    ([*WHOLE, "train.max_sync_gap=nan"], "train.max_sync_gap: got nan, expected a finite number"),
    ([*WHOLE, "train.max_sync_gap=inf"], "train.max_sync_gap: got inf, expected a finite number"),
    ([*WHOLE, "rollout.top_p=2"], "rollout.top_p: got 2.0, expected 1e-06 to 1.0"),
    (
        [*WHOLE, "rollout.engine=vlm"],
        "rollout.engine: got 'vlm', expected one of vllm, transformers (did you mean 'vllm'?)",
    ),
    (
        [*WHOLE, "model.path=./no"],
        "model.path: got './no', which does not exist, expected a folder, a hub name or builtin:NAME",
    ),
    (
        [*WHOLE, "model.path=${modl.x}"],
        "model.path: got a reference that leads nowhere (Interpolation key 'modl.x' not found), expected one that does",
    ),
    (
        ["train.steps=1,2"],
        "train.steps: got '1,2', expected one value; write train.steps=[1,2] for a list, or sweep with -m",
    ),
    (
        ["train.steps"],
        "override: got 'train.steps', expected key=value "
        "(a value with spaces, commas, brackets or quotes in quotes of its own: key='\"a, b\"')",
    ),
    (["+train.steps=3"], "train.steps: got it with '+', expected train.steps=VALUE without '+': the key exists"),
    (["~train.steps"], "train.steps: got a deletion, expected train.steps=VALUE"),
    (["~trainn"], "trainn: got an unknown key, expected a key that exists (did you mean 'train'?)"),
    (["+experiment=quickstart"], "experiment: got it twice or with '+', expected experiment=NAME once, without '+'"),
    (["algorithm=null"], "algorithm: got null, expected a name, or nothing at all"),
    (
        ["--multi-run"],
        "train: got '--multi-run', expected KEY=VALUE, --help, --cfg job, --multirun or --config-dir DIR "
        "(did you mean '--multirun'?)",
    ),
    (["--cfg", "jobb"], "--cfg: got 'jobb', expected job, hydra or all"),
    *(
        (
            [*WHOLE, word],
            f"{word.partition('=')[0]}: got range(...), choice(...), interval(...) or glob(...) inside a value, expected it "
            "as the whole value with -m; put quotes of its own around a text that looks so",
        )
        for word in (
            "rollout.stop=[range(1,3)]",
            "train={steps: choice(1,2)}",
            "rollout.stop=[glob(*)]",
            "algorithm.credit={name: {a: [interval(0,1)]}}",
        )
    ),
    (["--multirun", "++lora=default"], "lora: got it with '++', expected lora=default without '++'"),
    (["--cfg"], "train: got --cfg and nothing after it, expected --cfg VALUE"),
    (["--cfg=jobb"], "--cfg: got 'jobb', expected job, hydra or all"),
    (
        ["--info", "seed=1"],
        "--info: got 'seed=1', expected all, config, defaults, defaults-tree, plugins or searchpath",
    ),
    (
        ["--multirun", "--cfg", "job"],
        "--multirun: got it together with --cfg, expected one of --run, --multirun, --cfg, --info",
    ),
    (["--resolve"], "--resolve: got it alone, expected it with --cfg job or --help"),
    (["--config-name", "mine"], "--config-name: got 'mine', expected the name of a file in --config-dir"),
    (
        ["resume=nowhere"],
        "resume: got 'nowhere', expected a run's folder, its name under runs/, or one of its checkpoints",
    ),
]


COMPOSED = [case for case in LINES if not ({"resume", "algorithm"} & {word.split("=")[0] for word in case[0]})]
COMPOSED = [case for case in COMPOSED if not case[0][0].startswith("--") and "model.path=./no" not in case[0]]
THROUGH_MAIN = [case for case in LINES if case not in COMPOSED] + COMPOSED[::8]


def ids(cases):
    return [" ".join(words) for words, _ in cases]


@pytest.mark.parametrize(("words", "line"), COMPOSED, ids=ids(COMPOSED))
def test_a_wrong_configuration_says_got_and_expected_in_one_line(words, line):
    with pytest.raises(ConfigError) as error:
        to_config(compose_config(words))
    assert str(error.value) == line


@pytest.mark.parametrize(("words", "line"), THROUGH_MAIN, ids=ids(THROUGH_MAIN))
def test_a_wrong_configuration_is_printed_as_that_line_with_exit_code_2(words, line, build, capsys):
    assert main(["train", *words]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert build.calls == []


def test_an_unknown_algorithm_lists_those_there_are(build, capsys):
    assert main(["train", "algorithm=grop"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: algorithm: got 'grop', expected one of ") and " cispo, dapo, " in line
    assert line.endswith(" (did you mean 'grpo'?)\n")


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    expected = "error: command: got 'trian', expected one of train, evaluate, plan, show, sft, reward-model, dpo, doctor (did you mean 'train'?)\n"
    assert capsys.readouterr().err == expected


def test_a_mistake_in_a_recipe_names_the_file(tmp_path, build, capsys):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain: {stepz: 3}\n")
    assert main(["train", "experiment=mine", "--config-dir", "own"]) == 2
    assert capsys.readouterr().err == (
        "error: experiment/mine.yaml: train.stepz: got an unknown key, expected a key of train "
        "(did you mean 'train.steps'?)\n"
    )


def test_a_recipe_of_ones_own_is_found_beside_ours(tmp_path, build):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\ndefaults:\n  - quickstart\n  - override /algorithm: rloo\n  - _self_\nrecipe: mine\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(recipe)
    assert main(["train", "--config-dir", "own", "experiment=mine", "train.steps=3"]) == 0
    [(_, config, _)] = build.calls
    assert (config.recipe, config.algorithm.name, config.train.steps) == ("mine", "rloo", 3)


def test_train_hands_over_the_typed_configuration_and_the_same_as_plain_values(build):
    assert main(["train", "experiment=quickstart", "algorithm=dr_grpo", "rollout.max_response_tokens=32"]) == 0
    [(_, config, resolved)] = build.calls
    assert config.algorithm.reduction == {"name": "constant", "length": 32}
    assert resolved["algorithm"]["reduction"] == {"name": "constant", "length": 32}
    assert resolved["train"]["steps"] == config.train.steps == 40
    assert config.reward.functions == "numeric_match"


def test_values_that_a_path_a_module_or_a_list_needs_are_taken_as_they_are(build):
    Path("my_reward.py").write_text("def score(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    assert (
        main(
            [
                "train",
                *WHOLE,
                "reward.functions=my_reward.py:score",
                "data.train=hf:gsm8k:train",
                "evaluation.samples=4",
                "evaluation.k=[1,4]",
            ]
        )
        == 0
    )
    config = build.calls[0][1]
    assert (config.reward.functions, config.data.train, config.evaluation.k) == (
        "my_reward.py:score",
        "hf:gsm8k:train",
        [1, 4],
    )


def test_what_cannot_run_is_refused_before_the_run_is_built(build, capsys):
    assert main(["train", "experiment=quickstart", "algorithm.updates_per_batch=3"]) == 2
    assert capsys.readouterr().err.startswith("error: train.prompts_per_step: got 8 with algorithm.updates_per_batch=3")
    assert build.calls == []


def test_cfg_prints_what_was_composed_wherever_it_stands(capsys):
    assert main(["train", "experiment=quickstart", "--cfg", "job", "train.steps=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["steps"] == 7
    assert printed["algorithm"]["credit"] == {"name": "grpo", "normalize": "std", "eps": 1e-6}
    assert "hydra" not in printed


def test_help_names_commands_recipes_and_values(capsys):
    assert main(["--help"]) == 0
    assert "  train        train a model\n" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert f"experiment: {EXPERIMENTS}\n" in text
    assert "  micro_batch_tokens: 2048\n" in text


def test_a_reference_to_a_secret_file_is_printed_as_a_reference(tmp_path, capsys):
    (tmp_path / "key").write_text("hunter2")
    function = "reward.functions={function: 'http://judge', params: {api_key: 'file:key'}}"
    assert main(["train", "experiment=quickstart", function, "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    assert "api_key: file:key" in printed and "hunter2" not in printed


def test_composing_twice_in_one_process_gives_the_same():
    first, second = (to_config(compose_config(["experiment=tiny_ppo"]))[1] for _ in range(2))
    assert first == second
    with pytest.raises(ConfigError, match="experiment: got 'x'"):
        compose_config(["experiment=x"])
