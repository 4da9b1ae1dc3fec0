"""`apportion evaluate` up to where it would start actors: what it refuses, and what it needs."""

import json

import pytest
import yaml

from apportion import build
from apportion.cli import compose_config, to_config
from apportion.conf import before
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import ApportionError


class Started(Exception):
    pass


@pytest.fixture
def evaluated(tmp_path, monkeypatch, tiny):
    """`apportion evaluate` of a run whose training file is gone; Started once actors would be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started = []

    def cluster(config, needs, folder):
        started.append(folder.name)
        raise Started

    monkeypatch.setattr(build, "_cluster", cluster)
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    with CheckpointStore(folder / "checkpoints").writing(2) as inside:
        RunState(step=2, policy_version=2, data={}).save(inside)
        (inside / "model").symlink_to(tiny)
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")

    def evaluate(*words, checkpoint="first"):
        given = ["experiment=tiny_grpo", "data.train=gone.jsonl", "data.eval=held_out.jsonl", *words]
        return build.evaluate(to_config(compose_config(given))[0], checkpoint)

    return evaluate


def test_a_checkpoint_is_measured_without_the_data_that_it_was_trained_on(evaluated):
    with pytest.raises(Started):
        evaluated()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.eval=null", "evaluation.every_steps=0"], "data.eval: got none, expected a source to evaluate on"),
        (["data.eval=gone.jsonl"], "gone.jsonl: no such file or saved dataset; expected"),
        (
            ["evaluation.greedy=false", "evaluation.samples=0"],
            "evaluation.samples: got 0 with evaluation.greedy=false, expected at least 1",
        ),
        (
            ["evaluation.max_response_tokens=4000", "data.max_prompt_tokens=64"],
            "evaluation.max_response_tokens: got 4000 and data.max_prompt_tokens=64, expected at most 2048 together",
        ),
        (["environment.cls=nosuch"], "environment.cls"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_actors_start(evaluated, words, line):
    with pytest.raises(ApportionError) as error:
        evaluated(*words)
    assert str(error.value).startswith(line)


def test_a_wrong_checkpoint_is_called_what_the_command_calls_it(evaluated):
    with pytest.raises(ApportionError) as error:
        evaluated(checkpoint="frist")
    assert str(error.value) == (
        "checkpoint: got 'frist', expected a run's folder or name, or a checkpoint (did you mean 'first'?); runs has first"
    )


def test_a_teacher_that_a_stage_has_made_by_now_is_held_against_the_policy(tmp_path, monkeypatch):
    """The plan, before the stages run, could know nothing of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["experiment=aligndistil", "model.path=builtin:tiny", "before=[]"]
    config, resolved = to_config(compose_config([*words, "teachers.dpo=made", "teachers.other=builtin:tiny"]))
    config.before = ["dpo run_name=made data.train=x.jsonl"]
    assert [stage.run_name for stage in before.stages(config)] == ["made"]
    build.check_teachers(config, build.teacher_paths(config))
    run = tmp_path / "runs" / "made"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    with CheckpointStore(run / "checkpoints").writing(1) as inside:
        RunState(step=1, policy_version=1, data={}).save(inside)
        (inside / "model").mkdir()
        (inside / "model" / "config.json").write_text('{"vocab_size": 99}')
    with pytest.raises(
        ApportionError, match=r"^teachers\.dpo: got a model with 99 tokens, expected 264 as builtin:tiny"
    ):
        build.train(config, resolved)
