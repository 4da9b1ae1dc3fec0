"""A preference stage whose ranks do not fit their GPUs is refused before anything starts."""

import json
from dataclasses import replace

import pytest

from apportion.cli import compose_config, to_config
from apportion.conf.devices import Machine
from apportion.conf.gpu_memory import CONTEXT, GIB
from apportion.conf.preference_memory import check_gpu_memory
from apportion.conf.preference_schema import check
from apportion.platform.cuda import Gpu
from apportion.platform.errors import ConfigError

H100 = Gpu("NVIDIA H100 80GB HBM3", round(79.1 * GIB), (9, 0))
ONE, EIGHT = Machine(26, 220 * GIB, 1, H100), Machine(208, 1800 * GIB, 8, H100)
P, HEAD = 7_615_487_488, 152_064 * 3584
SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "model_type": "qwen2"}  # fmt: skip


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return str(tmp_path)


def composed(stage, model, *words):
    given = [f"model.path={model}", "data.train=pairs.jsonl", "cluster.gpus_per_policy_rank=1", *words]
    return to_config(compose_config(given, stage=stage))[0]


@pytest.mark.parametrize(("stage", "trained"), [("sft", P), ("dpo", P), ("reward_model", P - HEAD + 3584)])
def test_each_stage_counts_what_it_trains(model, stage, trained):
    [use] = check_gpu_memory(composed(stage, model, "cluster.policy_ranks=8"), EIGHT)
    [tenant] = use.tenants
    assert (use.count, tenant.role) == (8, stage)
    assert tenant.memory["weights"] == 2 * trained
    assert tenant.memory["moments"] == 8 * trained // 8
    assert ("logits" in tenant.memory) == (stage != "reward_model")


def test_a_stage_that_does_not_fit_is_refused_with_what_does(model):
    config = composed("sft", model)
    with pytest.raises(ConfigError) as error:
        check(config, ONE)
    line = str(error.value)
    assert line.startswith("GPU memory: got ") and "sft moments 56.7 GiB" in line and "\n" not in line
    answer = (
        "; no policy.micro_batch_tokens fits; {} fits, or with policy.gradient_checkpointing=true "
        "policy.micro_batch_tokens=1024 a model of at most 4.5 billion parameters"
    )
    assert answer.format("policy.offload_optimizer=true") in line
    with pytest.raises(ConfigError) as error:
        check(config, replace(ONE, memory_bytes=100 * GIB))  # main memory has no room for the optimizer
    assert answer.format("policy.lora.rank=16") in str(error.value)
    check(composed("sft", model, "policy.offload_optimizer=true"), ONE)
    check(composed("sft", model, "policy.lora.rank=16"), ONE)
    check(composed("sft", model, "cluster.address=10.0.0.1:6379"), ONE)  # that cluster's GPUs are not known here


def test_the_largest_micro_batch_of_a_stage_holds_both_answers(model):
    words = ["policy.lora.rank=16", "policy.micro_batch_tokens=1000000"]
    with pytest.raises(ConfigError, match=r"the largest policy\.micro_batch_tokens that fits is (\d+)") as error:
        check_gpu_memory(composed("dpo", model, *words), ONE)
    tokens = int(str(error.value).partition("that fits is ")[2].partition(",")[0])
    assert 2 * 1024 < tokens < 1_000_000
    check_gpu_memory(composed("dpo", model, words[0], f"policy.micro_batch_tokens={tokens}"), ONE)
    assert check_gpu_memory(composed("dpo", model, *words, "cluster.memory_check=false"), ONE)


def test_dpos_own_reference_is_beside_the_policy_before_the_first_step(model):
    words = ["policy.lora.rank=16", f"dpo.reference={model}"]
    [use] = check_gpu_memory(composed("dpo", model, *words), ONE)
    [tenant] = use.tenants
    adapters = 28 * 16 * (2 * (3584 + 3584) + 2 * (3584 + 512))
    beside = 2 * (P + adapters) + 4 * adapters + 2 * P + 4096 * 152064 * 4 * 2 + CONTEXT
    assert tenant.start >= beside
    assert tenant.bytes == tenant.start > sum(tenant.memory.values())


def test_ranks_on_cpus_are_not_looked_at(model):
    config = composed("sft", model, "cluster.gpus_per_policy_rank=0")
    assert check_gpu_memory(config, Machine(2, 8 * GIB, 0)) == []


def test_more_ranks_than_examples_or_parts_of_gpus_are_not_named(model):
    """Two ranks would fit by their memory where they have a GPU and an example each."""
    for more, named in ((), True), (["train.batch_size=1"], False), (["cluster.gpus_per_policy_rank=0.9"], False):
        config = composed("sft", model, "policy.zero_stage=2", *more)
        with pytest.raises(ConfigError) as error:
            check(config, replace(EIGHT, memory_bytes=GIB))  # main memory has no room for the optimizer
        assert ("cluster.policy_ranks=2" in str(error.value)) is named
