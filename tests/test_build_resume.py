"""A resume that is refused: nothing of the run has changed, no actor was started."""

import json

import pytest
import yaml

from apportion.cli import compose_config, to_config
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import ConfigError, DataError
from apportion.platform.run_lock import held

LINES = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def a_run(tmp_path, data):
    """A run whose metrics go one step past its checkpoint."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    (folder / "metrics.jsonl").write_text(LINES)
    with CheckpointStore(folder / "checkpoints").writing(2) as inside:
        RunState(step=2, policy_version=2, data=data).save(inside)
    return folder


def unchanged(folder):
    return (folder / "metrics.jsonl").read_text() == LINES and (folder / "config.yaml").read_text() == "seed: 0\n"


@pytest.fixture
def stage(monkeypatch):
    """`apportion dpo` up to where it would start ranks."""
    from apportion import preference_build

    monkeypatch.setattr(preference_build, "Cluster", lambda *_: pytest.fail("ranks were started"))

    def train(tmp_path, *words):
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 4)
        given = ["model.path=builtin:tiny", "data.train=pairs.jsonl", "resume=first", *words]
        return preference_build.train(*to_config(compose_config(given, stage="dpo")))

    return train


POSITION = {"examples": 4, "batch_size": 2, "seed": 0, "shuffle": True}


def test_a_stage_that_would_go_on_in_another_order_leaves_the_run_as_it_was(tmp_path, stage):
    folder = a_run(tmp_path, POSITION)
    with pytest.raises(ConfigError, match="resume: batch_size is 4 here and 2 in the checkpoint"):
        stage(tmp_path, "train.batch_size=4")
    assert unchanged(folder)


def test_a_stage_over_as_many_other_examples_leaves_the_run_as_it_was(tmp_path, stage):
    folder = a_run(tmp_path, POSITION | {"digest": 5})
    with pytest.raises(
        ConfigError, match="resume: the 4 training examples are not those that the checkpoint was written"
    ):
        stage(tmp_path, "train.batch_size=2")
    assert unchanged(folder)


def test_a_stage_that_had_all_its_steps_leaves_the_run_as_it_was(tmp_path, stage):
    folder = a_run(tmp_path, POSITION)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="resume: got a checkpoint of step 2 of 2, so nothing is left to do"):
        stage(tmp_path, "train.batch_size=2", "train.epochs=1")
    assert unchanged(folder)


def test_a_second_process_on_a_stages_run_is_refused(tmp_path, stage):
    folder = a_run(tmp_path, POSITION)
    with held(folder), pytest.raises(ConfigError, match="runs/first, which another process is running"):
        stage(tmp_path, "train.batch_size=2")
    assert unchanged(folder)


def test_a_run_is_held_before_its_newest_checkpoint_is_looked_for(tmp_path, monkeypatch):
    """A run that is ending may write one more while the checkpoint before it is being read."""
    from apportion import build
    from apportion.platform.run_lock import is_held

    folder = a_run(tmp_path, {"seed": 0})
    seen = []

    def found(argument, runs_root):
        seen.append(is_held(folder))
        raise ConfigError("enough")

    monkeypatch.setattr("apportion.platform.runs.find_checkpoint", found)
    config, resolved = to_config(compose_config(["experiment=tiny_grpo", "resume=first"]))
    with pytest.raises(ConfigError, match="enough"):
        build.train(config, resolved)
    assert seen == [True] and not is_held(folder)


@pytest.mark.parametrize(
    ("busy", "error", "line"),
    [
        (False, DataError, "data position: seed is 1 here and 0 in the checkpoint"),
        (True, ConfigError, "runs/first, which another process is running"),
    ],
)
def test_a_run_with_another_seed_or_in_use_is_refused_in_one_line_and_stays_as_it_was(
    busy, error, line, tmp_path, monkeypatch
):
    from contextlib import nullcontext

    from apportion import build

    monkeypatch.setattr(build, "Cluster", lambda *_: pytest.fail("actors were started"))
    folder = a_run(tmp_path, {"seed": 0})
    config, resolved = to_config(compose_config(["experiment=tiny_grpo", "resume=first", "seed=1"]))
    with held(folder) if busy else nullcontext(), pytest.raises(error, match=line):
        build.train(config, resolved)
    assert unchanged(folder)
