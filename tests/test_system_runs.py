"""Whole runs from the command line, on the tiny model: resumed, killed, starved, and what is left."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from run_commands import APPORTION, COMMON, QUICK, error_of, lines_of, starting, steps_of

pytestmark = pytest.mark.system

REWARDS = '''
import os, pathlib, signal

calls = singles = 0


def variety(prompts, completions, **columns):
    """How many different characters there are; in its third call it may take a rollout engine with it."""
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_IN_CALL", "0")):
        _kill_rollout_engine()
    return [len(set(text)) / 8 for text in completions]


def _kill_rollout_engine():
    log = str(pathlib.Path(os.environ["APPORTION_LOG"]).with_name("rollout-0.log"))
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\\0")
        except OSError:
            continue
        if f"APPORTION_LOG={log}".encode() in environment:
            os.kill(int(process.name), signal.SIGKILL)


def fragile(prompts, completions, **columns):
    """Two calls a step, one for each engine. Raises for three samples of the first step, and for all of the third."""
    global calls, singles
    if len(completions) > 1:
        calls += 1
    else:
        singles += 1
    if calls >= 5 or (calls == 1 and singles < 4):
        raise LookupError("the answer book is lost")
    return [len(set(text)) / 8 for text in completions]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("runs")
    (made / "rewards.py").write_text(REWARDS)
    return made


@pytest.fixture(scope="module")
def started(folder):
    with starting(folder) as start:
        yield start


REPEATED = [
    "train", "experiment=tiny_ppo", *COMMON, "train.deterministic=true", "train.steps=4", "checkpoint.every_steps=2",
    "checkpoint.keep=4", "tracking.samples_per_step=16", "policy.zero_stage=1", "reward.max_failed_share=0",
    "policy.learning_rate=1e-3", "algorithm.updates_per_batch=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def side_by_side(folder, started):
    """Two runs at once: one goes through, the other loses its rollout engine in its third step."""
    words = [*REPEATED, f"reward.functions={folder}/rewards.py:variety", f"runs_folder={folder}/runs"]
    whole = started(*words, "run_name=whole")
    killed = started(*words, "run_name=killed", KILL_IN_CALL="3")
    return whole.finished(), killed.finished()


def test_two_runs_beside_each_other_do_not_collide(side_by_side, folder):
    whole, _ = side_by_side
    assert whole.code == 0, whole.output
    steps = steps_of(folder / "runs/whole")
    assert sorted(steps) == [1, 2, 3, 4]
    assert [step for step in steps if "sync/gap" in steps[step]] == [1, 2, 3]
    assert all(steps[step]["sync/gap"] < 0.02 for step in (1, 2, 3))
    assert [step for step in steps if "sync/baseline" in steps[step]] == [1]
    assert whole.left_running() == []


def test_a_killed_actor_is_named_with_cause_and_last_words_and_nothing_is_left_running(side_by_side, folder):
    _, killed = side_by_side
    assert killed.code == 1
    # Kernels before 6.15 do not tell the signal.
    cause = r"(killed by SIGKILL|its process ended without an exit code: killed by a signal)"
    assert re.match(rf"error: rollout-0 \(pid \d+ on \S+\) died in \w+ of step 3 \(\w+\): {cause}", error_of(killed))
    assert f"last lines of {folder}/runs/killed/logs/rollout-0.log" in killed.output
    assert sorted(steps_of(folder / "runs/killed")) == [1, 2]
    assert killed.left_running() == []


def test_two_and_two_steps_equal_four_steps(side_by_side, folder, started):
    """The killed run goes on from its checkpoint of step 2 and ends with the losses, tokens and weights of the whole one."""
    from safetensors.torch import load_file

    one, other = folder / "runs/whole", folder / "runs/killed"
    resumed = started("train", "resume=killed", f"runs_folder={folder}/runs").finished()
    assert resumed.code == 0, resumed.output
    assert "at step 2" in resumed.output
    whole_steps, resumed_steps = steps_of(one), steps_of(other)
    assert sorted(resumed_steps) == [1, 2, 3, 4]
    for step, metrics in whole_steps.items():
        timeless = {k for k in metrics if not k.startswith(("timing/", "perf/", "time"))}
        assert timeless - {"step"} >= {"policy/loss", "critic/loss", "reward/mean", "policy/kl_reference"}
        for name in timeless:
            assert resumed_steps[step][name] == metrics[name], (step, name)
    assert lines_of(other, "samples.jsonl") == lines_of(one, "samples.jsonl")
    assert len(lines_of(one, "samples.jsonl")) == 4 * 16
    file = "checkpoints/step-000004/model/model.safetensors"
    weights, again = load_file(one / file), load_file(other / file)
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    start = load_file(one / "checkpoints/step-000002/model/model.safetensors")
    assert any(not torch.equal(start[name], weight) for name, weight in weights.items())
    assert len({m["policy/loss"] for m in whole_steps.values()}) == 4
    assert resumed.left_running() == []


def small_disk(folder: Path, words: list[str]) -> list[str] | None:
    """`words` where `folder`/disk is a file system of one MiB of their own, or None if this machine allows none."""
    unshare = shutil.which("unshare")
    mounted = f"mkdir -p {folder}/disk && mount -t tmpfs -o size=1m tmpfs {folder}/disk && "
    base = [str(unshare), "--user", "--map-root-user", "--mount", "sh", "-c"]
    if os.getuid() == 0:
        base.remove("--user")
        base.remove("--map-root-user")
    if unshare is None or subprocess.run([*base, mounted + "true"], capture_output=True).returncode:
        return None
    return [*base, mounted + 'exec "$@"', "sh", *words]


@pytest.fixture(scope="module")
def reward_model(folder, tiny):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    target = folder / "judge"
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def starved(folder, started, reward_model):
    """Two more at once. One has two engines, two sharded ranks, adapters, and rewards that fail; the other a reward
    model, a sharded optimiser, and a disk too small for a checkpoint."""
    failing = started(
        "train", "experiment=tiny_grpo", *QUICK, f"reward.functions={folder}/rewards.py:fragile", "train.steps=4",
        "reward.max_failed_share=0.5", "cluster.policy_ranks=2", "cluster.rollout_engines=2", "policy.zero_stage=3",
        "policy.gradient_checkpointing=true", "lora=default", "cluster.weight_transfer=broadcast",
        f"runs_folder={folder}/runs", "run_name=failing",
    )  # fmt: skip
    words = [
        "train", "experiment=tiny_grpo", *QUICK, "checkpoint.final=true", f"reward.functions=model:{reward_model}",
        "train.steps=1", "policy.zero_stage=2", f"runs_folder={folder}/disk",
        "run_name=full",
    ]  # fmt: skip
    wrapped = small_disk(folder, [APPORTION, *words])
    full = started(*wrapped[1:], program=wrapped[0]) if wrapped else None
    return failing.finished(), full and full.finished()


def test_a_reward_that_raises_for_a_few_samples_is_masked_and_counted_and_the_run_goes_on(starved, folder):
    failing, _ = starved
    steps = steps_of(folder / "runs/failing")
    assert sorted(steps) == [1, 2], failing.output
    assert [steps[s]["reward/failed_share"] for s in (1, 2)] == [3 / 16, 0.0]
    assert steps[2]["weights/version"] == 2
    assert all(steps[s]["sync/gap"] < 0.02 for s in (1, 2))  # two sharded ranks scored together, with adapters
    assert steps[2]["policy/grad_norm"] > 0


def test_a_reward_that_raises_for_all_stops_the_run_with_its_traceback(starved):
    failing, _ = starved
    assert failing.code == 1
    assert re.match(r"error: reward: 100% of this step's samples failed, expected at most 50% ", error_of(failing))
    assert "LookupError: the answer book is lost" in failing.output
    assert 'rewards.py", line ' in failing.output
    assert failing.left_running() == []


def test_a_full_disk_is_one_line_and_nothing_is_left_running(starved):
    _, full = starved
    if full is None:
        pytest.skip("this machine allows no small file system of one's own")
    assert full.code == 1, full.output
    assert re.match(r"error: checkpoint of step 1: the disk of \S+ is full: needed .* free \d+ bytes; ", error_of(full))
    assert "Traceback" not in full.output
    assert full.left_running() == []
