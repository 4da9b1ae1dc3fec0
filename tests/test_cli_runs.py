"""The command line's runs: exit codes, sweeps, a run's own configuration, and how fast it answers."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apportion.cli import compose_config, main, to_config
from apportion.platform.errors import ActorError
from apportion.saved import saved_config


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def test_the_exit_code_is_what_the_run_gives(build):
    build.outcome = lambda: 3
    assert main(["train", "experiment=quickstart"]) == 3


def fail(error):
    def outcome():
        raise error

    return outcome


def test_an_error_of_the_run_is_its_line_and_details_without_a_traceback(build, capsys):
    build.outcome = fail(ActorError("policy-0: died (exit code 137), expected it to live\n  last log line"))
    assert main(["train", "experiment=quickstart"]) == 1
    assert capsys.readouterr().err == "error: policy-0: died (exit code 137), expected it to live\n  last log line\n"


def test_what_an_error_quotes_of_a_model_or_a_row_cannot_steer_the_terminal(build, capsys):
    build.outcome = fail(ActorError("reward-0: got '\x1b]0;mine\x07\x1b[2Jhello\ud83d'\n\tline\r\x9b31m two"))
    assert main(["train", "experiment=quickstart"]) == 1
    assert capsys.readouterr().err == "error: reward-0: got 'hello'\n\tline31m two\n"


def test_an_interruption_is_exit_code_130(build, capsys):
    build.outcome = fail(KeyboardInterrupt())
    assert main(["train", "experiment=quickstart"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistake_of_our_own_keeps_its_traceback(build):
    build.outcome = fail(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["train", "experiment=quickstart"])


@pytest.mark.slow
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
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_writes_none_of_its_words_to_the_disk(build, tmp_path):
    assert main(["train", "experiment=quickstart", "-m", "seed=0,1", "data.system_prompt=s3cret"]) == 0
    assert [config.data.system_prompt for _, config, _ in build.calls] == ["s3cret", "s3cret"]
    assert list(tmp_path.iterdir()) == []


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_what_the_system_refuses_is_one_line_and_a_sweep_goes_on(build, capsys):
    build.outcome = full_disk
    assert main(["train", "experiment=quickstart", "-m", "seed=0,1"]) == 1
    assert len(build.calls) == 2
    line = (
        "error: got OSError: No space left on device, expected the system to allow it: look at free space, paths and "
        "permissions\n"
    )
    assert capsys.readouterr().err == 2 * line


def test_what_the_system_refuses_before_a_run_is_one_line_too(tmp_path, capsys):
    saved = a_run(tmp_path) / "config.yaml"
    saved.unlink()
    saved.symlink_to("/proc/self/mem")  # a file that can be opened and not be read, by root too
    assert main(["train", "resume=first"]) == 1
    assert capsys.readouterr().err.startswith("error: got OSError: Input/output error, expected the system to allow it")


def test_a_recipe_that_is_no_yaml_is_one_line(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("seed: 1\n  train: 2\n")
    assert main(["plan", f"--config-dir={tmp_path}", "experiment=mine"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: got ScannerError: mapping values are not allowed here in ")
    assert error.endswith('mine.yaml", line 2, column 8, expected YAML: correct that line\n')


@pytest.mark.slow
def test_an_interruption_ends_a_sweep(build, capsys):
    build.outcome = fail(KeyboardInterrupt())
    assert main(["train", "experiment=quickstart", "-m", "seed=0,1,2"]) == 130
    assert len(build.calls) == 1
    assert capsys.readouterr().err == "interrupted\n"


def test_a_run_leaves_no_file_of_hydras_and_the_working_folder_alone(build, tmp_path):
    assert main(["train", "experiment=quickstart"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


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


@pytest.mark.parametrize("value", ["~/runs", '"~/runs"'])
@pytest.mark.slow
def test_a_home_in_the_runs_folder_is_expanded_for_every_command(tmp_path, build, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    a_run(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", "experiment=tiny_grpo", f"runs_folder={value}"]) == 0
    assert main(["train", "resume=first", f"runs_folder={value}"]) == 0
    assert main(["evaluate", "first", f"runs_folder={value}"]) == 0
    assert [config.runs_folder for _, config, _ in build.calls] == [str(tmp_path / "runs")] * 3
    assert compose_and_type("runs_folder='~/runs'").runs_folder == str(tmp_path / "runs")


def compose_and_type(word):
    return to_config(compose_config(["experiment=tiny_grpo", word]))[0]


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


HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "numpy", "pandas", "matplotlib", "wandb", "datasets")
ASK = """
import sys, time
start = time.perf_counter()
from apportion.cli import main
code = main(sys.argv[1:])
seconds = time.perf_counter() - start
print(code, seconds, *[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_python_m_and_a_closed_pipe_are_quiet():
    command = f"{sys.executable} -m apportion train --cfg job experiment=quickstart | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("seed: 0\n", "")


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_whose_reader_has_gone_is_quiet(word):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as gone:
        done = subprocess.run(
            [sys.executable, "-m", "apportion", word],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.stderr, done.returncode) == ("", 1)


def test_an_override_of_hydra_itself_does_not_move_the_run(build, tmp_path):
    before = dict(os.environ)
    assert main(["train", "experiment=quickstart", "hydra.verbose=false"]) == 0
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


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
