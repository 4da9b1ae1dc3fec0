"""GPU memory of whole plans: four machines and four models as docs/gpu.md has them, and what refusals name. Machines are
described, models are config.json files of the real sizes without weights."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from apportion.cli import compose_config, to_config
from apportion.conf.devices import Machine
from apportion.conf.gpu_memory import GIB
from apportion.conf.models import read_model
from apportion.plan import make_plan
from apportion.platform.cuda import Gpu
from apportion.platform.errors import ConfigError

PAGE = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
H100 = Gpu("NVIDIA H100 80GB HBM3", round(79.1 * GIB), (9, 0))
SMALL = Gpu("NVIDIA GeForce RTX 4090", round(23.5 * GIB), (8, 9))
A40S = Machine(64, 900 * GIB, 8, Gpu("NVIDIA A40", 45 * GIB, (8, 6)))
MACHINES = {
    "24 GB": Machine(16, 128 * GIB, 1, SMALL),
    "80 GB": Machine(26, 220 * GIB, 1, H100),
    "8 x 80 GB": Machine(208, 1800 * GIB, 8, H100),
    "2 x 8 x 80 GB": Machine(208, 1800 * GIB, 8, H100, nodes=2),
}
# hidden, inner, layers, heads, key-value heads, vocabulary, tied; published parameters in billions
QWEN = {
    "0.5 B": ((896, 4864, 24, 14, 2, 151936, True), 0.494),
    "1.5 B": ((1536, 8960, 28, 12, 2, 151936, True), 1.544),
    "7 B": ((3584, 18944, 28, 28, 4, 152064, False), 7.616),
    "32 B": ((5120, 27648, 64, 40, 8, 152064, False), 32.764),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size", "tie_word_embeddings")  # fmt: skip
# The run of docs/gpu.md; null leaves to the device what the recipe, made for two cores, sets.
RUN = [
    "data.max_prompt_tokens=512", "rollout.max_response_tokens=1024", "policy.micro_batch_tokens=8192",
    "train.prompts_per_step=64", "policy.zero_stage=null", "rollout.compile=null",
]  # fmt: skip
HALVES = ["cluster.gpus_per_policy_rank=0.5", "cluster.gpus_per_rollout_engine=0.5"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (sizes, _) in QWEN.items():
        config = dict(zip(NAMES, sizes, strict=True)) | {"model_type": "qwen2", "max_position_embeddings": 32768}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@cache
def composition():
    return compose_config(["experiment=quickstart", "algorithm=grpo"])


def planned(models, name, machine, *words):
    values = OmegaConf.from_dotlist([f"model.path={models / name}", *RUN, *words])
    where = MACHINES[machine] if isinstance(machine, str) else machine
    return make_plan(to_config(OmegaConf.merge(composition(), values))[0], where)


def refusal(models, name, machine, *words):
    with pytest.raises(ConfigError) as error:
        planned(models, name, machine, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def rows(heading):
    """Cells of the table below a row of headings, without code marks."""
    lines = PAGE.split(heading, 1)[1].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]


LAYOUTS = {machine: layout.split() for machine, _, layout in rows("| Machine | GPUs | Layout |")}
CELLS = rows("| Machine | Model | Settings | Policy GPU | Engine GPU | Result |")


def test_sizes_without_weights_give_the_published_parameters(models):
    for name, (_, billions) in QWEN.items():
        assert read_model(str(models / name)).parameters / 1e9 == pytest.approx(billions, abs=0.001)


def test_the_table_of_the_page_has_every_machine_and_model():
    assert {(machine, model) for machine, model, *_ in CELLS} == {(m, n) for m in MACHINES for n in QWEN}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: ", ".join(cell[:3]))
def test_the_plan_says_what_the_table_of_the_page_says(models, cell):
    machine, model, settings, policy, engine, result = cell
    words = [*LAYOUTS[machine], *settings.split()]
    if result == "fits":
        uses = planned(models, model, machine, *words).gpus
        held = {tenant.role: f"{use.bytes / GIB:.1f}" for use in uses for tenant in use.tenants}
        assert held == {"policy": policy, "rollout": engine}
        assert sum(use.count for use in uses) == MACHINES[machine].nodes * MACHINES[machine].gpus
    else:
        line = refusal(models, model, machine, *words)
        assert line.startswith(f"GPU memory: got {policy} GiB on one {MACHINES[machine].gpu.name} (")
        assert result.removeprefix("refused: ") in line


def test_the_worked_example_of_the_page_is_what_is_printed_and_adds_up(models):
    block = re.search(r"```\n(GPU memory\n.*?)```", PAGE, re.DOTALL).group(1)
    plan = planned(models, "1.5 B", "80 GB", *HALVES)
    assert block in plan.render()
    policy = next(tenant for tenant in plan.gpus[0].tenants if tenant.role == "policy")
    named = re.findall(r"^    (\w+) .*= +([\d,]+)  +[\d.]+ GiB$", PAGE, re.MULTILINE)
    by_hand = {name: int(number.replace(",", "")) for name, number in named}
    assert by_hand == policy.memory
    assert sum(by_hand.values()) == 35_850_522_624
    assert f"{sum(by_hand.values()):,}" in PAGE


def test_the_sums_of_two_larger_models_are_those_of_the_plan(models):
    table = rows("| Part | 7 B: 7,615,487,488 parameters | 32 B: 32,763,417,600 parameters |")
    wide = "cluster.rollout_engines=2 cluster.gpus_per_rollout_engine=2 rollout.tensor_parallel_size=2"
    runs = [
        ("7 B", "8 x 80 GB", []),
        ("32 B", "2 x 8 x 80 GB", ["policy.zero_stage=3", *wide.split(), "cluster.policy_ranks=12"]),
    ]
    for column, (model, machine, words) in enumerate(runs, 1):
        plan = planned(models, model, machine, *LAYOUTS[machine], *words)
        policy = next(tenant for use in plan.gpus for tenant in use.tenants if tenant.role == "policy")
        by_hand = {row[0]: int(row[column].split("= ")[-1].replace(",", "")) for row in table[:-1] if row[column]}
        by_hand["context"] = 536_870_912
        assert by_hand == policy.memory
        total = table[-1][column].split(" = ")[0]
        assert sum(by_hand.values()) == int(total.replace(",", ""))


def test_the_refusal_of_the_page_is_what_is_printed(models):
    line = re.search(r"```\n(GPU memory: .*?)\n```", PAGE, re.DOTALL).group(1)
    assert refusal(models, "7 B", "80 GB", *HALVES) == line


def test_136_and_45_gib_on_one_gpu_are_refused(models):
    """What once passed without a note."""
    words = [*HALVES, "rollout.gpu_memory_utilization=0.57", "policy.gradient_checkpointing=true"]
    line = refusal(models, "7 B", "80 GB", *words, "cluster.memory_check=false")
    firm = 2 * 7_615_487_488 + 16 * 7_615_487_488 + 400_000_000 + GIB // 2
    share = round(0.57 * H100.memory_bytes) + GIB // 2
    assert line.startswith(
        f"GPU memory: got {(firm + share) / GIB:.1f} GiB on one NVIDIA H100 80GB HBM3 (policy moments"
    )
    assert share / GIB > 45


def test_the_largest_micro_batch_that_fits_is_named_and_fits(models):
    words = [*HALVES, "policy.micro_batch_tokens={}"]
    line = refusal(models, "1.5 B", "80 GB", *HALVES, "policy.micro_batch_tokens=131072")
    named = re.search(r"; the largest policy.micro_batch_tokens that fits is (\d+), or (\S+)$", line)
    tokens, instead = int(named.group(1)), named.group(2)
    assert (
        planned(models, "1.5 B", "80 GB", *HALVES, f"policy.micro_batch_tokens={tokens}").gpus[0].bytes
        <= H100.memory_bytes
    )
    refusal(models, "1.5 B", "80 GB", *HALVES, f"policy.micro_batch_tokens={tokens + 1}")
    planned(models, "1.5 B", "80 GB", *[word.format(131072) for word in words], instead)


def test_estimates_refuse_nothing_without_the_memory_check(models):
    plan = planned(models, "1.5 B", "80 GB", *HALVES, "policy.micro_batch_tokens=131072", "cluster.memory_check=false")
    assert plan.gpus[0].bytes > H100.memory_bytes > plan.gpus[0].firm_bytes
    assert "GiB too much" in plan.render()


def test_a_share_that_leaves_too_little_for_the_policy_is_lowered_first(models):
    line = refusal(models, "1.5 B", "80 GB", *HALVES, "rollout.gpu_memory_utilization=0.7")
    at = "with policy.gradient_checkpointing=true policy.micro_batch_tokens=1536"
    assert f"; rollout.gpu_memory_utilization=0.57 fits, or {at} a model of at most 1.1 billion" in line
    planned(models, "1.5 B", "80 GB", *HALVES, "rollout.gpu_memory_utilization=0.57")


def test_an_engine_without_room_for_one_sequence_is_refused_with_the_least_share(models):
    words = [*HALVES, "policy.lora.rank=16"]
    line = refusal(models, "7 B", "80 GB", *words, "rollout.gpu_memory_utilization=0.2")
    assert line == (
        "rollout.gpu_memory_utilization: got 0.2, 15.8 GiB of a GPU with 79.1 GiB, which has no room for weights and working "
        "memory of 16.7 GiB and the cache of one sequence of 1536 tokens, 84 MiB; expected at least 0.22"
    )
    planned(models, "7 B", "80 GB", *words, "rollout.gpu_memory_utilization=0.22")


def test_zero_3_that_cannot_start_is_refused_whatever_training_takes(models):
    """Each rank's GPU holds the whole model before it is sharded."""
    words = ["cluster.policy_ranks=6", "cluster.gpus_per_policy_rank=1", "policy.zero_stage=3", "policy.lora.rank=16",
             "cluster.gpus_per_rollout_engine=2", "rollout.tensor_parallel_size=2"]  # fmt: skip
    line = refusal(models, "32 B", A40S, *words, "cluster.memory_check=false")
    assert line == (
        "GPU memory: got 61.6 GiB on one NVIDIA A40 (policy whole model at its start 61.6 GiB), expected at most its "
        "45.0 GiB; at these settings a model of at most 23.8 billion parameters fits"
    )


def test_an_engine_whose_weights_are_too_large_is_offered_more_gpus(models):
    words = ["cluster.policy_ranks=4", "cluster.gpus_per_policy_rank=1", "cluster.rollout_engines=4",
             "cluster.gpus_per_rollout_engine=1"]  # fmt: skip
    machine = Machine(64, 900 * GIB, 8, Gpu("NVIDIA A10", 22 * GIB, (8, 6)))
    small = ["policy.lora.rank=16", "rollout.gpu_memory_utilization=0.7"]
    line = refusal(models, "7 B", machine, *words, *small)
    wider = "rollout.tensor_parallel_size=2 cluster.gpus_per_rollout_engine=2 cluster.rollout_engines=2"
    assert "policy.logits_chunk_tokens=1024 with rollout.gpu_memory_utilization=0.77 fits" in line
    narrow = refusal(models, "7 B", replace(machine, gpu=replace(machine.gpu, memory_bytes=17 * GIB)), *words, *small)
    at = "with policy.gradient_checkpointing=true policy.micro_batch_tokens=1536"
    assert f"{wider} with policy.zero_stage=3 fits, or {at} a model of at most 5 billion" in narrow


def test_settings_that_another_check_refuses_are_not_named(models):
    """Two ranks would fit these GPUs by their memory, and cannot each have a part of one."""
    machine = Machine(32, 256 * GIB, 2, replace(SMALL, memory_bytes=31 * GIB))
    words = ["cluster.gpus_per_policy_rank=0.6", "cluster.gpus_per_rollout_engine=0.4", "policy.logits_chunk_tokens=512",
             "cluster.rollout_engines=2", "rollout.gpu_memory_utilization=0.2", "policy.micro_batch_tokens=1536"]  # fmt: skip
    line = refusal(models, "1.5 B", machine, *words)
    assert "; policy.offload_optimizer=true fits, or " in line
    planned(models, "1.5 B", machine, *words, "policy.offload_optimizer=true")
    ranks = refusal(models, "1.5 B", machine, *words, "cluster.policy_ranks=2")
    assert ranks.startswith("cluster.gpus_per_policy_rank: got 0.6 with cluster.policy_ranks=2, expected 1")


def test_whole_gpus_are_offered_where_some_are_idle(models):
    """The policy fits 32 GiB, and no engine beside it."""
    machine = replace(A40S, gpu=replace(A40S.gpu, memory_bytes=32 * GIB))
    words = [*HALVES, "policy.logits_chunk_tokens=1024", "policy.micro_batch_tokens=1536"]
    alone = "cluster.gpus_per_policy_rank=1 cluster.gpus_per_rollout_engine=1"
    assert f"; no policy.micro_batch_tokens fits; {alone} fits, or " in refusal(models, "1.5 B", machine, *words)
    plan = planned(models, "1.5 B", machine, *words, *alone.split())
    assert [use.count for use in plan.gpus] == [1, 1]
    assert "gpus_per" not in refusal(models, "1.5 B", replace(machine, gpus=1), *words)


def test_a_share_above_the_default_is_lowered_together_with_other_settings(models):
    machine = Machine(16, 128 * GIB, 1, replace(SMALL, memory_bytes=31 * GIB))
    line = refusal(models, "1.5 B", machine, *HALVES, "rollout.gpu_memory_utilization=0.95")
    named = ["rollout.gpu_memory_utilization=0.4", "policy.offload_optimizer=true"]
    assert line.endswith(f"; no policy.micro_batch_tokens fits; {' with '.join(named)} fits")
    planned(models, "1.5 B", machine, *HALVES, *named)


def test_a_critics_optimizer_is_offloaded_only_where_main_memory_has_room(models):
    words = [f"model.path={models / '1.5 B'}", *RUN, "policy.lora.rank=16", "critic.micro_batch_tokens=1536",
             "reference.micro_batch_tokens=1536", "cluster.gpus_per_reference_rank=1", "cluster.gpus_per_policy_rank=1",
             "cluster.gpus_per_rollout_engine=1", "cluster.gpus_per_critic_rank=1"]  # fmt: skip
    ppo = compose_config(["experiment=quickstart", "algorithm=ppo", "lora=default"])
    config = to_config(OmegaConf.merge(ppo, OmegaConf.from_dotlist(words)))[0]
    gpu = replace(SMALL, memory_bytes=24 * GIB)
    lines = []
    for memory in (40, 20):  # its masters, moments, gradients and staging take 18 P: 25.4 GiB
        with pytest.raises(ConfigError) as error:
            make_plan(config, Machine(16, memory * GIB, 4, gpu))
        lines.append(str(error.value))
    assert "critic.offload_optimizer=true fits" in lines[0]
    assert lines[1].startswith("GPU memory: ") and "offload_optimizer" not in lines[1]


def test_the_largest_model_is_named_with_the_settings_that_it_needs(models):
    """0.5 B does not fit as it is: a small model has no checkpointing by default, and a larger micro-batch here."""
    at = ["policy.gradient_checkpointing=true", "policy.micro_batch_tokens=1536"]
    line = refusal(models, "7 B", "24 GB", *HALVES)
    assert line.endswith(
        f"; no policy.micro_batch_tokens fits; with {' '.join(at)} a model of at most 0.57 billion parameters fits"
    )
    refusal(models, "0.5 B", "24 GB", *HALVES)
    assert planned(models, "0.5 B", "24 GB", *HALVES, *at).gpus[0].bytes <= SMALL.memory_bytes
    given = refusal(models, "7 B", "24 GB", *HALVES, *at)
    assert given.endswith("; at these settings a model of at most 0.57 billion parameters fits")


def test_a_cache_that_holds_fewer_sequences_than_are_decoded_is_noted(models):
    words = ["data.max_prompt_tokens=2768", "rollout.max_response_tokens=30000", "policy.micro_batch_tokens=32768"]
    plan = planned(models, "7 B", "8 x 80 GB", *LAYOUTS["8 x 80 GB"], *words)
    held = (round(0.9 * H100.memory_bytes) - 2 * 7_615_487_488 - 5 * GIB // 2) // (32768 * 2 * 28 * 4 * 128 * 2)
    assert held == 31
    assert (
        f"the KV cache holds {held} longest sequences of rollout.max_sequences=256; more rollout.gpu_memory_utilization may "
        "decode faster"
    ) in plan.notes


def test_scores_that_generate_keeps_are_counted_and_fewer_rows_are_offered(models):
    line = refusal(models, "0.5 B", "80 GB", *HALVES, "rollout.engine=transformers")
    assert f"(rollout scores {256 * 1024 * 151936 * 4 / GIB:.1f} GiB, " in line
    assert "rollout.max_sequences=64 fits" in line


def test_every_role_with_a_gpu_is_counted(models):
    shares = [
        "cluster.gpus_per_critic_rank=1",
        "cluster.gpus_per_reference_rank=0.5",
        "cluster.gpus_per_reward_worker=0.25",
    ]
    words = ["algorithm=ppo", "cluster.policy_ranks=2", "cluster.gpus_per_policy_rank=1", "cluster.gpus_per_rollout_engine=2",
             "rollout.tensor_parallel_size=2", f"reward.functions=model:{models / '0.5 B'}"]  # fmt: skip
    values = OmegaConf.from_dotlist([f"model.path={models / '1.5 B'}", *RUN, *shares, *words[1:]])
    ppo = OmegaConf.merge(compose_config(["experiment=quickstart", "algorithm=ppo"]), values)
    plan = make_plan(to_config(ppo)[0], MACHINES["8 x 80 GB"])
    by_roles = {tuple(tenant.role for tenant in use.tenants): use for use in plan.gpus}
    assert {roles: use.count for roles, use in by_roles.items()} == {
        ("rollout",): 2, ("policy",): 2, ("critic",): 2, ("reference", "reward"): 1,
    }  # fmt: skip
    reference, reward = by_roles["reference", "reward"].tenants
    assert reference.memory["weights"] == 2 * 1_543_656_960
    assert reward.memory["weights"] == 4 * 494_005_120 and reward.known
    critic = by_roles["critic",].tenants[0].memory
    assert critic["moments"] == 8 * (1_543_656_960 + 1536) // 2 and "logits" not in critic


def test_sums_without_a_limit_where_the_gpu_is_not_known(models):
    plan = planned(models, "7 B", Machine(16, 500 * GIB, 1), *HALVES)
    assert len(plan.gpus) == 1 and plan.gpus[0].gpu is None
    engine = 2 * 7_615_487_488 + 5 * GIB // 2 + 1536 * 57_344 + GIB // 2
    assert plan.gpus[0].tenants[1].bytes == engine
    assert re.search(r"^  1 x GPU: \d+\.\d GiB$", plan.render(), re.MULTILINE)
    joined = planned(models, "7 B", "80 GB", *HALVES, "cluster.address=10.0.0.1:6379")
    assert [use.gpu for use in joined.gpus] == [None]


def test_a_model_of_unknown_size_is_said_to_be_unknown(models):
    values = OmegaConf.from_dotlist(["model.path=nobody/nothing-of-that-name", *RUN, *HALVES])
    plan = make_plan(to_config(OmegaConf.merge(composition(), values))[0], MACHINES["80 GB"])
    policy, engine = plan.gpus[0].tenants
    assert not policy.known and policy.memory == {"context": GIB // 2}
    assert engine.memory["share"] == round(0.4 * H100.memory_bytes)


def test_main_memory_holds_what_is_offloaded_and_nothing_else_of_a_role_on_a_gpu(models):
    words = [*HALVES, "policy.offload_optimizer=true"]
    plan = planned(models, "1.5 B", "80 GB", *words)
    memory = plan.actor("policy").memory
    assert {name: memory[name] / 1_543_656_960 for name in ("masters", "adam", "gradients")} == {
        "masters": 4, "adam": 8, "gradients": 4,
    }  # fmt: skip
    assert list(plan.actor("rollout").memory) == ["process"]
    small = Machine(26, 100 * GIB, 1, H100)
    line = refusal(models, "7 B", small, *HALVES, "policy.lora=null")
    assert "offload_optimizer" not in line  # its optimizer would not fit main memory


def test_what_is_offloaded_to_too_little_main_memory_is_refused_by_its_key(models):
    described = Machine(16, 128 * GIB, 1, H100, assumed="a description")
    words = [*HALVES, "policy.offload_optimizer=true", "policy.zero_stage=3"]
    held = f"{(4 + 8 + 4 + 4) * 7_615_487_488 / GIB:.1f}"  # masters, moments, gradients, staging
    assert refusal(models, "7 B", described, *words) == (
        f"policy.offload_optimizer: got true, and main memory would hold {held} GiB, expected at most the 128.0 GiB of the "
        "machine; try policy.offload_optimizer=false, policy.lora.rank=16 or a smaller model"
    )


def test_a_plan_that_leaves_the_gpus_unused_says_so(models):
    end = ": sampling and updating take turns on the cores"
    noted = [note for note in planned(models, "0.5 B", "80 GB").notes if note.endswith(end)]
    assert noted == [f"no role has a GPU, though there are some (cluster.gpus_per_*){end}"]
    without = planned(models, "0.5 B", Machine(16, 128 * GIB, 0)).notes
    assert [note for note in without if note.endswith(end)] == [f"no GPU{end}"]


def test_a_plan_without_gpus_has_no_such_section(models):
    plan = planned(models, "0.5 B", Machine(2, 64 * GIB, 0))
    assert plan.gpus == [] and "GPU memory" not in plan.render()
