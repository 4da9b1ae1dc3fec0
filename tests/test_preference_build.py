"""The build of a preference stage on ranks that only keep what they are asked: the order of a start and of a resume."""

from types import SimpleNamespace

import pytest
import yaml

from apportion import preference_build, preference_trainer
from apportion.actors.engine import OptimizerStep
from apportion.actors.preference import StepReport
from apportion.batch import Totals
from apportion.cli import compose_config, to_config
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import ConfigError


class RecorderRank:
    """Answers at once and keeps the name of each call."""

    def __init__(self):
        self.calls, self.given = [], {}

    def call(self, method, *arguments, returns=1):
        self.calls.append(method)
        self.given[method] = arguments
        return SimpleNamespace(
            refs=[getattr(self, f"_{method}", lambda *_: None)(*arguments), *["sums"] * (returns - 1)]
        )

    def _update(self, share):
        return StepReport(Totals({"dpo/loss": 0.5}, {"dpo/loss": 0.0}), OptimizerStep(1.0, 0.1), 4)


@pytest.fixture
def rank(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = RecorderRank()
    cluster = SimpleNamespace(check_shared=lambda *_: None, peak_memory_mib=dict, on_gpus=list, shutdown=lambda: None)
    monkeypatch.setattr(preference_build, "Cluster", lambda *_: cluster)
    monkeypatch.setattr(preference_build, "_ranks", lambda *_: [made])
    monkeypatch.setattr(preference_trainer, "put", lambda value: value)
    monkeypatch.setattr(preference_trainer, "gather", lambda calls, seconds, what: [call.refs[0] for call in calls])
    return made


def train(tmp_path, *words):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 4)
    given = ["model.path=builtin:tiny", "data.train=pairs.jsonl", "train.batch_size=2", "train.epochs=1"]
    quiet = ["tracking.console=false", "tracking.plots=false", "checkpoint.every_steps=0", "checkpoint.final=false"]
    return preference_build.train(*to_config(compose_config([*given, *quiet, *words], stage="dpo")))


def test_a_start_makes_the_references_log_probs_before_the_first_update(rank, tmp_path):
    assert train(tmp_path, "run_name=first") == 0
    assert rank.calls == ["load_data", "reference_logprobs", "set_reference", "update", "update"]
    assert rank.given["reference_logprobs"][0].tolist() == [0, 1, 2, 3]
    assert rank.given["set_reference"] == ("sums",)


def test_a_resume_makes_them_while_the_ranks_still_hold_the_starting_weights(rank, tmp_path):
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    position = {"examples": 4, "batch_size": 2, "seed": 0, "shuffle": True}
    with CheckpointStore(folder / "checkpoints").writing(1) as inside:
        RunState(step=1, policy_version=1, data=position).save(inside)
    assert train(tmp_path, "resume=first") == 0
    said = (folder / "metrics.jsonl").read_text()
    assert "the checkpoint is of an earlier version and has no digest of the training examples" in said
    assert rank.calls == ["load_data", "reference_logprobs", "set_reference", "load", "update"]
    assert rank.given["load"] == (str(folder / "checkpoints" / "step-000001"),)
    assert len(rank.given["update"][0].examples) == 2


def test_a_stage_keeps_a_digest_of_its_examples_and_goes_on_with_the_same_ones_alone(rank, tmp_path):
    assert train(tmp_path, "run_name=first", "checkpoint.final=true") == 0
    [written] = CheckpointStore("runs/first/checkpoints").latest().state.ranks.items()
    assert written[0] == "policy" and written[1]["ranks"] == 1
    assert train(tmp_path, "resume=first", "train.epochs=2") == 0
    assert "earlier version" not in (tmp_path / "runs" / "first" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="resume: the 4 training examples are not those"):
        train(tmp_path, "resume=first", "train.epochs=3", "data.system_prompt=brief")


def test_ranks_that_join_late_are_late_for_the_start(monkeypatch):
    """The error names the key of this limit: cluster.start_timeout_seconds."""
    config = to_config(
        compose_config(
            ["model.path=builtin:tiny", "data.train=p.jsonl", "cluster.start_timeout_seconds=7"], stage="sft"
        )
    )[0]
    cluster = SimpleNamespace(joined=False, expect=lambda _: None, start=lambda requests, _: requests)
    waited = []
    monkeypatch.setattr(preference_build, "join", lambda *_: ["setup"])
    monkeypatch.setattr(preference_build, "gather", lambda *given: waited.append(given))
    preference_build._ranks(config, cluster, None)
    assert waited == [(["setup"], 7.0, "start of actors")]
