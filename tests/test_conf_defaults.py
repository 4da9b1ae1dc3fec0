"""What null in a configuration becomes on each device, and what a plan says of it."""

import dataclasses
from functools import cache

import pytest
from omegaconf import OmegaConf

from apportion.actors.engine_settings import EngineSettings
from apportion.assembly.serving import rollout_spec
from apportion.cli import compose_config, to_config
from apportion.conf import defaults
from apportion.conf.defaults import engine_settings, left_to_device, policy_settings, rollout_settings
from apportion.conf.devices import Machine
from apportion.conf.judges import judge_spec
from apportion.conf.models import ModelFacts
from apportion.conf.schema import CriticConfig, PolicyConfig
from apportion.conf.schema_experience import RolloutConfig
from apportion.plan import make_plan
from apportion.preference_build import _spec as preference_spec
from apportion.preference_build import objective_of

LAPTOP = Machine(cores=2, memory_bytes=24 * 2**30, gpus=0)
JUDGED = ["algorithm=capo", "judge.model=builtin:tiny", "judge.function=null"]
JUDGED += ["judge.context_tokens=1024", "judge.max_tokens=256"]
NULLS = ["policy.zero_stage=null", "rollout.max_sequences=null"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@cache
def composition(recipe, algorithm):
    return compose_config([f"experiment={recipe}", *algorithm])


def composed(*words, recipe="tiny_ppo"):
    """A recipe with other values; what Hydra makes of the recipe is kept."""
    algorithm = tuple(word for word in words if word.startswith("algorithm="))
    values = OmegaConf.from_dotlist([word for word in words if word not in algorithm])
    return to_config(OmegaConf.merge(composition(recipe, algorithm), values))[0]


def model_of(parameters: int) -> ModelFacts:
    return ModelFacts(parameters, 24, 1024, 8, 64, 32000, 8192, {})


def test_on_cpus_an_engine_is_set_as_it_always_was():
    assert engine_settings(PolicyConfig(), 0, model_of(7 * 10**9)) == EngineSettings()
    assert engine_settings(CriticConfig(), 0, None) == EngineSettings(learning_rate=1e-5)
    settings = rollout_settings(RolloutConfig(), 0)
    assert (settings.max_sequences, settings.compile) == (64, False)


@pytest.mark.parametrize(
    ("model", "checkpointing"), [(model_of(10**9), False), (model_of(10**9 + 1), True), (None, True)]
)
@pytest.mark.parametrize("gpus", [0.5, 1])
def test_on_a_gpu_an_engine_takes_fused_adam_zero_2_and_larger_chunks(model, checkpointing, gpus):
    settings = engine_settings(PolicyConfig(), gpus, model)
    assert settings == EngineSettings(
        zero_stage=2, gradient_checkpointing=checkpointing, logits_chunk_tokens=4096, fused_adam=True, overlap_comm=True,
        bucket_elements=200_000_000,
    )  # fmt: skip


def test_an_optimizer_in_main_memory_is_not_torchs():
    assert not engine_settings(PolicyConfig(offload_optimizer=True), 1, None).fused_adam


def test_what_is_given_stays_on_any_device():
    given = PolicyConfig(zero_stage=3, gradient_checkpointing=False, logits_chunk_tokens=77, learning_rate=0.5)
    for gpus in (0, 1):
        settings = engine_settings(given, gpus, None)
        shown = (settings.zero_stage, settings.gradient_checkpointing, settings.logits_chunk_tokens)
        assert (*shown, settings.learning_rate) == (3, False, 77, 0.5)
    rollout = RolloutConfig(max_sequences=9, compile=False, gpu_memory_utilization=0.7)
    assert dataclasses.astuple(rollout_settings(rollout, 1)) == (9, False, 0.7)


@pytest.mark.parametrize(
    ("gpus", "right"), [(1, (256, True, 0.9)), (4, (256, True, 0.9)), (0.5, (256, True, 0.4)), (0.3, (256, True, 0.24))]
)
def test_a_rollout_engine_on_gpus(gpus, right):
    assert dataclasses.astuple(rollout_settings(RolloutConfig(), gpus)) == right


@pytest.mark.parametrize(("gpus", "right"), [(0, (64, False)), (0.5, (256, True))])
def test_the_run_starts_what_the_plan_counts(gpus, right):
    config = composed(f"cluster.gpus_per_rollout_engine={gpus}", "rollout.max_sequences=null")
    spec = rollout_spec(config, "m", 0).engine_spec
    assert (spec.max_sequences, spec.compile) == right


@pytest.mark.parametrize(
    ("gpus", "given", "right"), [(0, "null", (False, 0.9)), (0.5, "null", (True, 0.4)), (1, "0.6", (True, 0.6))]
)
def test_a_judges_engine_uses_graphs_on_a_gpu(tmp_path, gpus, given, right):
    words = [f"cluster.gpus_per_judge={gpus}", f"judge.gpu_memory_utilization={given}"]
    engine = judge_spec(composed(*JUDGED, *words), "m", tmp_path, 1).model.engine_spec
    assert (engine.compile, engine.gpu_memory_utilization) == right


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
@pytest.mark.parametrize(("gpus", "fused", "zero_stage", "chunk"), [(0, False, 0, 512), (1, True, 2, 4096)])
def test_a_preference_stage_chooses_by_its_device_too(stage, gpus, fused, zero_stage, chunk):
    words = ["model.path=builtin:tiny", "data.train=x.jsonl", f"cluster.gpus_per_policy_rank={gpus}"]
    config, _ = to_config(compose_config(words, stage=stage))
    settings = preference_spec(config, objective_of(config), "m", 3).settings
    assert (settings.fused_adam, settings.zero_stage, settings.logits_chunk_tokens) == (fused, zero_stage, chunk)
    assert settings.gradient_checkpointing is False


def listed(*words, needs=frozenset(), model=None, recipe="tiny_ppo"):
    choices = left_to_device(composed(*NULLS, *words, recipe=recipe), frozenset(needs), model)
    return {choice.key: choice.value for choice in choices}


CPU = {
    "policy.zero_stage": 0,
    "policy.gradient_checkpointing": False,
    "policy.logits_chunk_tokens": 512,
    "rollout.max_sequences": 64,
    "rollout.compile": False,
}


def test_a_plan_lists_what_is_left_to_cpus():
    assert listed() == CPU
    assert listed("rollout.engine=transformers") == {k: v for k, v in CPU.items() if k != "rollout.compile"}


def test_a_plan_lists_what_is_left_to_gpus_by_role():
    words = [f"cluster.gpus_per_{role}=1" for role in ("policy_rank", "critic_rank", "judge")]
    words += ["cluster.gpus_per_rollout_engine=0.5", "critic.zero_stage=1", "critic.offload_optimizer=true", *JUDGED]
    assert listed(*words, "cluster.policy_ranks=2", needs={"values", "critiques"}, model=model_of(2 * 10**9)) == {
        "policy.zero_stage": 2,
        "policy.gradient_checkpointing": True,
        "policy.logits_chunk_tokens": 4096,
        "policy: fused AdamW": True,
        "policy: overlap_comm": True,
        "critic.gradient_checkpointing": True,
        "critic.logits_chunk_tokens": 4096,
        "critic: overlap_comm": True,
        "rollout.max_sequences": 256,
        "rollout.compile": True,
        "rollout.gpu_memory_utilization": 0.4,
        "judge.gpu_memory_utilization": 0.9,
        "judge: CUDA graphs": True,
    }


def test_a_rank_alone_has_nothing_to_overlap_and_stage_0_no_buckets():
    for words in (["cluster.policy_ranks=1"], ["cluster.policy_ranks=2", "policy.zero_stage=0"]):
        assert "policy: overlap_comm" not in listed("cluster.gpus_per_policy_rank=1", *words)


def test_what_is_given_is_not_listed():
    words = ["policy.zero_stage=2", "policy.gradient_checkpointing=true", "policy.logits_chunk_tokens=512"]
    words += ["rollout.max_sequences=64", "rollout.compile=false", "rollout.gpu_memory_utilization=0.9"]
    assert listed(*words) == {}
    assert listed(*words, "cluster.gpus_per_policy_rank=1") == {"policy: fused AdamW": True}


def test_the_printed_plan_says_why():
    lines = make_plan(composed(recipe="quickstart"), LAPTOP).render().splitlines()
    at = lines.index("left to the device")
    assert lines[at : at + 7] == [
        "left to the device",
        "  policy.zero_stage                  0  main memory holds the whole optimizer",
        "  policy.gradient_checkpointing  false  main memory holds the activations",
        "  policy.logits_chunk_tokens       512  fits a CPU's caches",
        "  rollout.max_sequences             64  enough rows for a CPU's cores",
        "  rollout.compile                false  graphs take a minute to build on a CPU",
        "",
    ]
    given = ["policy.zero_stage=0", "policy.gradient_checkpointing=false", "policy.logits_chunk_tokens=512"]
    given += ["rollout.max_sequences=64", "rollout.compile=false"]
    assert "left to the device" not in make_plan(composed(*given, recipe="quickstart"), LAPTOP).render()


def test_the_reason_for_checkpointing_is_the_models_size():
    config = composed("cluster.gpus_per_policy_rank=1")
    for model, why in (
        (model_of(1_500_000_000), "1,500,000,000 parameters, above 1 billion"),
        (model_of(135_000_000), "135,000,000 parameters, at most 1 billion"),
        (None, "the model's size is not known here"),
    ):
        [choice] = [c for c in left_to_device(config, frozenset(), model) if c.key.endswith("checkpointing")]
        assert choice.why == why and choice.value is policy_settings(config, model).gradient_checkpointing


def test_every_setting_of_an_engine_is_definite():
    for gpus in (0, 1):
        settings = dataclasses.asdict(engine_settings(PolicyConfig(), gpus, None))
        assert [name for name, value in settings.items() if value is None] == []
    assert defaults.BUCKET_ELEMENTS % 2 == 0
