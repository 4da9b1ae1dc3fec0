"""The command line: exact error lines, exit codes, sweeps, a run's own configuration, and how fast it answers."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from apportion.cli import compose_config, main, to_config
from apportion.conf import schema
from apportion.platform.errors import ActorError, ConfigError
from apportion.saved import saved_config

EXPERIMENTS = ", ".join(sorted(file.stem for file in (Path(schema.__file__).parent / "experiment").glob("*.yaml")))
WHOLE = ["model.path=m", "data.train=t.jsonl", "reward.functions=numeric_match"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.fixture
def build(monkeypatch):
    """Stands for apportion.build: keeps what it is given, and does what a test tells it."""
    calls = []
    module = types.ModuleType("apportion.build")
    module.outcome = lambda: 0
    module.calls = calls

    def train(config, resolved):
        calls.append(("train", config, resolved))
        return module.outcome()

    def evaluate(config, checkpoint):
        calls.append(("evaluate", config, checkpoint))
        return module.outcome()

    module.train, module.evaluate = train, evaluate
    monkeypatch.setitem(sys.modules, "apportion.build", module)
    return module


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
        "train: got 3, expected its keys, one by one (steps, prompts_per_step, deterministic, max_minutes, sync_check)",
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
    (["--cfg"], "train: got --cfg and nothing after it, expected --cfg VALUE"),
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


def test_the_exit_code_is_what_the_run_gives(build):
    build.outcome = lambda: 3
    assert main(["train", "experiment=quickstart"]) == 3


def test_what_cannot_run_is_refused_before_the_run_is_built(build, capsys):
    assert main(["train", "experiment=quickstart", "algorithm.updates_per_batch=3"]) == 2
    assert capsys.readouterr().err.startswith("error: train.prompts_per_step: got 8 with algorithm.updates_per_batch=3")
    assert build.calls == []


def fail(error):
    def outcome():
        raise error

    return outcome


def test_an_error_of_the_run_is_its_line_and_details_without_a_traceback(build, capsys):
    build.outcome = fail(ActorError("policy-0: died (exit code 137), expected it to live\n  last log line"))
    assert main(["train", "experiment=quickstart"]) == 1
    assert capsys.readouterr().err == "error: policy-0: died (exit code 137), expected it to live\n  last log line\n"


def test_an_interruption_is_exit_code_130(build, capsys):
    build.outcome = fail(KeyboardInterrupt())
    assert main(["train", "experiment=quickstart"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistake_of_our_own_keeps_its_traceback(build):
    build.outcome = fail(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["train", "experiment=quickstart"])


def test_a_sweep_runs_every_combination_and_goes_on_after_a_failure(build, capsys, tmp_path):
    outcomes = iter([0, ActorError("rollout-0: died"), 0, 0])

    def outcome():
        value = next(outcomes)
        if isinstance(value, Exception):
            raise value
        return value

    build.outcome = outcome
    assert main(["train", "experiment=quickstart", "-m", "algorithm=grpo,rloo", "seed=0,1"]) == 1
    assert [(c.algorithm.name, c.seed) for _, c, _ in build.calls] == [
        ("grpo", 0),
        ("grpo", 1),
        ("rloo", 0),
        ("rloo", 1),
    ]
    assert "error: rollout-0: died\n" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["multirun.yaml"]
    assert (tmp_path / "runs" / "sweeps").is_dir()


def test_an_interruption_ends_a_sweep(build, capsys):
    build.outcome = fail(KeyboardInterrupt())
    assert main(["train", "experiment=quickstart", "-m", "seed=0,1,2"]) == 130
    assert len(build.calls) == 1
    assert capsys.readouterr().err == "interrupted\n"


def test_a_run_leaves_no_file_of_hydras_and_the_working_folder_alone(build, tmp_path):
    assert main(["train", "experiment=quickstart"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


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


def test_plan_prints_the_plan(capsys):
    assert main(["plan", "experiment=tiny_grpo", "train.prompts_per_step=5"]) == 0
    assert "  trajectories a step                       20  = 5 prompts x 4 responses\n" in capsys.readouterr().out


def a_run(tmp_path, name="first", **changes):
    """A run's folder as it is left behind: its configuration and a checkpoint."""
    resolved = to_config(compose_config(["experiment=quickstart", "algorithm=rloo"]))[1]
    folder = tmp_path / "runs" / name
    (folder / "checkpoints" / "step_000010" / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved | changes))
    return folder


def test_a_run_continues_with_its_own_configuration(tmp_path, build):
    a_run(tmp_path, seed=7)
    assert main(["train", "resume=first", "train.steps=50"]) == 0
    config = build.calls[0][1]
    assert (config.seed, config.algorithm.name, config.train.steps, config.resume) == (7, "rloo", 50, "first")


def test_a_recipe_on_the_command_line_goes_before_the_runs_own(tmp_path, build):
    a_run(tmp_path, seed=7)
    assert main(["train", "experiment=quickstart", "resume=first"]) == 0
    config = build.calls[0][1]
    assert (config.seed, config.algorithm.name, config.resume) == (0, "grpo", "first")


def test_a_value_of_lora_keeps_the_others_of_the_resumed_run(tmp_path, build):
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj"]}
    folder = a_run(tmp_path)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["policy"]["lora"] = lora
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert main(["train", "resume=first", "policy.lora.alpha=16"]) == 0
    found = build.calls[0][1].policy.lora
    assert (found.rank, found.alpha, found.targets) == (4, 16.0, ["q_proj"])


def test_the_nearest_run_is_named(tmp_path, build, capsys):
    a_run(tmp_path)
    assert main(["train", "resume=frist"]) == 2
    assert capsys.readouterr().err == (
        "error: resume: got 'frist', expected a run's folder, its name under runs/, or one of its checkpoints "
        "(did you mean 'first'?)\n"
    )


@pytest.mark.parametrize(
    "place", ["first", "runs/first", "runs/first/checkpoints/step_000010", "runs/first/checkpoints/step_000010/model"]
)
def test_a_run_its_name_or_a_checkpoint_leads_to_its_configuration(tmp_path, place):
    folder = a_run(tmp_path)
    assert saved_config(place).resolve() == folder / "config.yaml"


def test_evaluate_measures_a_checkpoint_under_the_configuration_of_its_run(tmp_path, build):
    a_run(tmp_path, seed=7)
    assert main(["evaluate", "runs/first", "evaluation.samples=8", "evaluation.k=[1,8]"]) == 0
    [(what, config, checkpoint)] = build.calls
    assert (what, checkpoint, config.seed, config.evaluation.k) == ("evaluate", "runs/first", 7, [1, 8])
    assert config.data.eval == [{"source": "arithmetic", "high": 30, "eval_pairs": 128}]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "evaluate: got nothing, expected apportion evaluate CHECKPOINT_OR_RUN [KEY=VALUE ...]"),
        (["seed=1"], "evaluate: got 'seed=1', expected apportion evaluate CHECKPOINT_OR_RUN [KEY=VALUE ...]"),
        (["no"], "checkpoint: got 'no', expected a run's folder, its name under runs/, or one of its checkpoints"),
    ],
)
def test_evaluate_needs_something_to_evaluate(words, line, build, capsys):
    assert main(["evaluate", *words]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_reference_to_a_secret_file_is_printed_as_a_reference(tmp_path, capsys):
    (tmp_path / "key").write_text("hunter2")
    function = "reward.functions={function: 'http://judge', params: {api_key: 'file:key'}}"
    assert main(["train", "experiment=quickstart", function, "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    assert "api_key: file:key" in printed and "hunter2" not in printed


HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "numpy", "pandas", "matplotlib", "wandb", "datasets")
ASK = """
import sys, time
start = time.perf_counter()
from apportion.cli import main
code = main(sys.argv[1:])
seconds = time.perf_counter() - start
print(code, seconds, *[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--cfg", "job", "experiment=quickstart"],
        ["plan", "experiment=tiny_ppo"],
    ],
    ids=lambda words: " ".join(words),
)
def test_it_answers_without_importing_anything_heavy(words):
    script = ASK.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=True
    )
    code, seconds, *heavy = done.stderr.split()
    assert (code, heavy) == ("0", [])
    assert float(seconds) < 10  # about half a second where nothing else runs


def test_ctrl_c_in_a_real_process_is_a_word_and_130(tmp_path):
    (tmp_path / "apportion_fake_build.py").write_text(
        "import sys, time, types\n"
        "build = types.ModuleType('apportion.build')\n"
        "def train(config, resolved):\n"
        "    try:\n"
        "        print('running', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally: print('shut down', flush=True)\n"
        "build.train = train\n"
        "sys.modules['apportion.build'] = build\n"
        "from apportion.cli import main\n"
        "sys.exit(main(['train', 'experiment=quickstart']))\n"
    )
    command = [sys.executable, "apportion_fake_build.py"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("shut down\n", "interrupted\n", 130)


def test_python_m_and_a_closed_pipe_are_quiet():
    command = f"{sys.executable} -m apportion train --cfg job experiment=quickstart | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("seed: 0\n", "")


def test_an_override_of_hydra_itself_does_not_move_the_run(build, tmp_path):
    before = dict(os.environ)
    assert main(["train", "experiment=quickstart", "hydra.verbose=false"]) == 0
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


def test_composing_twice_in_one_process_gives_the_same():
    first, second = (to_config(compose_config(["experiment=tiny_ppo"]))[1] for _ in range(2))
    assert first == second
    with pytest.raises(ConfigError, match="experiment: got 'x'"):
        compose_config(["experiment=x"])


def test_show_writes_a_page_of_a_runs_samples_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    assert main(["show", "first"]) == 1
    assert "got no samples" in capsys.readouterr().err
    line = '{"step": 1, "prompt": "p", "reward": 1, "finish_reason": "stop", "policy_version": 0, "tokens": [], "advantages": []}'
    (run / "samples.jsonl").write_text(line + "\n")
    assert main(["show", "first"]) == 0
    assert capsys.readouterr().out.strip() == "runs/first/tokens.html"
    assert (run / "tokens.html").is_file()
    assert main(["show", "secnd"]) == 2
    assert main(["show"]) == 2
