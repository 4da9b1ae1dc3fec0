"""Arithmetic, placement, memory and refusals of `apportion plan`. A machine is described, never measured."""

import json
from functools import cache

import pytest
from omegaconf import OmegaConf

from apportion.cli import compose_config, to_config
from apportion.conf.devices import Machine
from apportion.conf.memory import GIB
from apportion.plan import make_plan
from apportion.platform.errors import ApportionError, ConfigError

LAPTOP = Machine(cores=2, memory_bytes=24 * GIB, gpus=0)
SERVER = Machine(cores=64, memory_bytes=512 * GIB, gpus=8)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path))  # builtin models as they are described, not as they were made


@cache
def composition(algorithm):
    return compose_config(["experiment=quickstart", algorithm])


def planned(*overrides, machine=LAPTOP):
    """The quickstart's plan with other values; an algorithm is composed once and kept."""
    algorithm = next((word for word in overrides if word.startswith("algorithm=")), "algorithm=grpo")
    values = OmegaConf.from_dotlist([word for word in overrides if word != algorithm])
    return make_plan(to_config(OmegaConf.merge(composition(algorithm), values))[0], machine)


def refusal(*overrides, machine=LAPTOP):
    with pytest.raises(ConfigError) as error:
        planned(*overrides, machine=machine)
    return str(error.value)


def test_every_batch_size_comes_with_its_arithmetic():
    plan = planned()
    assert {q.name: (q.value, q.arithmetic) for q in plan.quantities} == {
        "trajectories a step": (64, "8 prompts x 8 responses"),
        "trajectories an engine": (64, "ceil(8 prompts / 1 engines) x 8 responses"),
        "decoding rounds": (1, "ceil(64 / 64 side by side)"),
        "tokens a trajectory": (120, "at most 96 prompt + 24 response"),
        "tokens a step": (7680, "at most 64 trajectories x 120"),
        "trajectories an update": (64, "64 / 1 updates a batch"),
        "trajectories a rank and update": (64, "about ceil(64 / 1 ranks), balanced by tokens"),
        "longest rows a micro-batch": (17, "2048 padded tokens // 120"),
        "micro-batches a rank and update": (4, "about ceil(64 / 17)"),
        "optimiser steps a batch": (1, "1 updates x 1 epochs"),
        "optimiser steps": (40, "40 steps x 1"),
        "responses an evaluation": (128, "at most 128 prompts x (1 greedy + 0 sampled)"),
    }


def test_ranks_updates_epochs_and_engines_divide_the_batch():
    plan = planned(
        "train.prompts_per_step=12",
        "algorithm.updates_per_batch=2",
        "algorithm.epochs=3",
        "cluster.policy_ranks=4",
        "cluster.rollout_engines=5",
        "rollout.max_sequences=10",
        "evaluation.samples=4",
    )
    assert plan.value("trajectories a step") == 96
    assert plan.value("trajectories an engine") == 3 * 8
    assert plan.value("decoding rounds") == 3
    assert plan.value("trajectories an update") == 48
    assert plan.value("trajectories a rank and update") == 48 / 4
    assert plan.value("optimiser steps a batch") == 6
    assert plan.value("optimiser steps") == 240
    assert plan.value("responses an evaluation") == 128 * 5


def test_groups_stay_whole_on_ranks_where_a_method_reads_their_hidden_states():
    thr = ["algorithm=thr", "train.prompts_per_step=3", "rollout.responses_per_prompt=8"]
    for ranks, rows in ((1, 24), (2, 16), (3, 8), (4, 6)):  # 3 groups are not enough for 4 ranks and are split
        assert planned(*thr, f"cluster.policy_ranks={ranks}").value("trajectories a rank and update") == rows


def test_a_critic_and_a_reference_exist_only_where_something_needs_them():
    assert [a.role for a in planned().actors] == ["policy", "rollout", "credit", "reward"]
    assert [a.role for a in planned("algorithm=ppo").actors] == [
        "policy", "rollout", "critic", "reference", "credit", "reward",
    ]  # fmt: skip
    kl = planned("algorithm.kl.place=loss", "algorithm.kl.coefficient=0.1")
    assert kl.needs == {"reference_logprobs"} and kl.needs_reference and not kl.needs_critic
    assert kl.actor("reference").count == 1 and kl.actor("critic") is None


def test_actors_carry_their_count_and_gpus():
    plan = planned(
        "algorithm=ppo",
        "cluster.policy_ranks=2",
        "cluster.gpus_per_policy_rank=1",
        "cluster.gpus_per_critic_rank=1",
        "cluster.gpus_per_reference_rank=1",
        "cluster.gpus_per_rollout_engine=3",
        "rollout.tensor_parallel_size=3",
        "reward.workers=3",
        machine=SERVER,
    )
    assert {a.role: (a.count, a.gpus, a.on_gpu) for a in plan.actors} == {
        "policy": (2, 1, True),
        "rollout": (1, 3, True),
        "critic": (2, 1, True),
        "reference": (1, 1, True),
        "credit": (1, 0, False),
        "reward": (3, 0, False),
    }


P = 134_515_008


@pytest.mark.parametrize(
    ("stage", "ranks", "expected"),
    [
        (0, 1, {"weights": 2 * P, "masters": 4 * P, "adam": 8 * P, "gradients": 6 * P}),
        (1, 4, {"weights": 2 * P, "masters": P, "adam": 2 * P, "gradients": 4 * P}),
        (2, 4, {"weights": 2 * P, "masters": P, "adam": 2 * P, "gradients": P}),
        (3, 4, {"weights": P // 2, "masters": P, "adam": 2 * P, "gradients": P}),
    ],
)
def test_zero_stages_part_the_training_state_among_ranks(stage, ranks, expected):
    memory = planned(f"policy.zero_stage={stage}", f"cluster.policy_ranks={ranks}").actor("policy").memory
    assert {name: memory[name] for name in expected} == expected


def test_float32_needs_no_masters():
    memory = planned("model.dtype=float32").actor("policy").memory
    assert (memory["weights"], memory["adam"], memory["gradients"]) == (4 * P, 8 * P, 4 * P)
    assert "masters" not in memory


def test_lora_trains_its_adapters_only():
    memory = planned("policy.lora.rank=8", "policy.lora.targets=[q_proj,down_proj]").actor("policy").memory
    adapters = 30 * 8 * ((576 + 576) + (1536 + 576))
    assert memory["weights"] == 2 * (P + adapters)
    assert memory["adam"] == 8 * adapters


def test_logits_exist_a_chunk_at_a_time():
    memory = planned("policy.logits_chunk_tokens=100").actor("policy").memory
    assert memory["logits"] == 100 * 49152 * 4 * 3


def test_the_cache_of_a_cpu_engine_is_what_was_asked_for_and_elsewhere_what_is_decoded():
    assert planned("rollout.kv_cache_gib=3").actor("rollout").memory["kv cache"] == 3 * GIB
    memory = planned("rollout.engine=transformers").actor("rollout").memory
    assert memory["kv cache"] == 64 * 120 * (2 * 30 * 3 * 64 * 2)


def test_a_model_that_is_not_here_has_no_memory_estimate():
    plan = planned("model.path=nobody/nothing-of-that-name")
    assert not plan.actor("policy").memory_known
    assert "memory of nobody/nothing-of-that-name is not known: it is not on this machine yet" in plan.notes
    assert "not known" in plan.render()


def test_a_joined_cluster_is_not_measured_by_this_machine():
    plan = planned("cluster.address=10.0.0.1:6379", "cluster.policy_ranks=4", "cluster.gpus_per_policy_rank=1")
    assert (plan.actor("policy").count, plan.actor("policy").gpus) == (4, 1)
    assert [plan.actor(role).threads for role in ("policy", "rollout")] == [None, None]
    assert "    1     1    share  " in plan.render() and "    1     0      all  " in plan.render()
    assert "the cluster's size is not known here: it is joined by address" in plan.notes


def test_an_actor_with_gpus_has_its_share_of_the_cores():
    words = ["cluster.policy_ranks=2", "cluster.gpus_per_policy_rank=1", "cluster.gpus_per_rollout_engine=0.5"]
    threads = {actor.role: actor.threads for actor in planned(*words, machine=SERVER).actors}
    assert threads == {"policy": 8, "rollout": 4, "credit": 1, "reward": 1}
    threads = {actor.role: actor.threads for actor in planned(*words, "cluster.threads=3", machine=SERVER).actors}
    assert threads == {"policy": 3, "rollout": 3, "credit": 1, "reward": 1}
    assert {planned(machine=SERVER).actor(role).threads for role in ("policy", "rollout")} == {64}


def test_the_printed_plan_reads_as_a_table():
    lines = planned().render().splitlines()
    assert lines[0] == "quickstart: grpo on builtin:smollm2-135m-instruct, 40 steps"
    assert "  trajectories a step                       64  = 8 prompts x 8 responses" in lines
    assert any(
        line.startswith("  policy          1     1     0        2  5.5 GiB = weights 257 MiB + ") for line in lines
    )
    assert "  - signals the algorithm asks for: none" in lines


REFUSALS = [
    (
        ["algorithm.updates_per_batch=3"],
        "train.prompts_per_step: got 8 with algorithm.updates_per_batch=3, expected a multiple of 3 such as 6 or 9, "
        "so that every optimiser step has whole groups",
    ),
    (
        ["algorithm.updates_per_batch=16"],
        "train.prompts_per_step: got 8 with algorithm.updates_per_batch=16, expected a multiple of 16 such as 16, "
        "so that every optimiser step has whole groups",
    ),
    (
        ["algorithm.updates_per_batch=2", "cluster.policy_ranks=33"],
        "train.prompts_per_step: got 8, which gives 32 trajectories an optimiser step for cluster.policy_ranks=33, "
        "expected at least 10, or fewer ranks",
    ),
    (
        ["policy.micro_batch_tokens=100"],
        "policy.micro_batch_tokens: got 100, expected at least 120 = data.max_prompt_tokens=96 + "
        "rollout.max_response_tokens=24, the longest sequence",
    ),
    (
        ["algorithm=ppo", "critic.micro_batch_tokens=100"],
        "critic.micro_batch_tokens: got 100, expected at least 120 = data.max_prompt_tokens=96 + "
        "rollout.max_response_tokens=24, the longest sequence",
    ),
    (
        ["rollout.max_response_tokens=9000", "policy.micro_batch_tokens=20000"],
        "rollout.max_response_tokens: got data.max_prompt_tokens=96 + rollout.max_response_tokens=9000 = 9096, "
        "expected at most 8192, the model's context; shorten prompts or responses",
    ),
    (
        ["evaluation.max_response_tokens=8192"],
        "evaluation.max_response_tokens: got 8192 and data.max_prompt_tokens=96, "
        "expected at most 8192 together, the model's context",
    ),
    (
        ["rollout.responses_per_prompt=1"],
        "rollout.responses_per_prompt: got 1 with credit grpo, which compares the responses to a prompt, "
        "expected at least 2 (or algorithm=reinforce_pp or ppo)",
    ),
    (
        ["algorithm.kl.coefficient=0.1"],
        "algorithm.kl.coefficient: got 0.1 with algorithm.kl.place=none, "
        "expected place=reward or place=loss, or a coefficient of 0",
    ),
    (
        ["rollout.tensor_parallel_size=2", "cluster.gpus_per_rollout_engine=1"],
        "cluster.gpus_per_rollout_engine: got 1 with rollout.tensor_parallel_size=2, expected 2, a GPU for each part, "
        "or 0 for parts on the CPU",
    ),
    (
        ["cluster.weight_transfer=broadcast", "cluster.gpus_per_policy_rank=1"],
        "cluster.weight_transfer: got broadcast with gpus_per_policy_rank=1 and gpus_per_rollout_engine=0, "
        "expected whole GPUs for both or none for both; otherwise take object_store",
    ),
    (
        ["rollout.tensor_parallel_size=2", "rollout.engine=transformers"],
        "rollout.tensor_parallel_size: got 2 with rollout.engine=transformers, expected 1, or rollout.engine=vllm",
    ),
    (
        ["cluster.rollout_engines=9"],
        "cluster.rollout_engines: got 9 for train.prompts_per_step=8, "
        "expected at most 8: the responses to a prompt are sampled on one engine",
    ),
    (
        ["policy.offload_optimizer=true", "policy.zero_stage=0"],
        "policy.offload_optimizer: got true with policy.zero_stage=0, expected zero_stage 1, 2 or 3",
    ),
    (
        ["policy.offload_optimizer=true", "policy.zero_stage=2"],
        "policy.offload_optimizer: got true with cluster.gpus_per_policy_rank=0, expected false: "
        "without a GPU the optimiser is in main memory already",
    ),
    (
        ["algorithm=ppo", "critic.offload_optimizer=true", "critic.zero_stage=0"],
        "critic.offload_optimizer: got true with critic.zero_stage=0, expected zero_stage 1, 2 or 3",
    ),
    (
        ["algorithm=ppo", "critic.warmup_steps_without_policy=5", "train.steps=5"],
        "critic.warmup_steps_without_policy: got 5 with train.steps=5, expected fewer: the policy would never be trained",
    ),
    (
        ["algorithm=ppo", "algorithm.kl.target=0"],
        "algorithm.kl.target: got 0.0, expected above 0, or null for a fixed coefficient",
    ),
    (
        ["model.attention=flash_attention_2"],
        "model.attention: got flash_attention_2 with cluster.gpus_per_policy_rank=0, expected sdpa or eager, or a GPU",
    ),
    (
        ["cluster.gpus_per_policy_rank=1", "cluster.gpus_per_rollout_engine=1"],
        "cluster: got 2 GPUs over all actors, expected what fits the 0 of this machine; "
        "lower cluster.gpus_per_*, or join a cluster with cluster.address",
    ),
    (
        ["cluster.threads=4"],
        "cluster.threads: got 4, expected at most 2, the cores of this machine, or null for all",
    ),
    (
        ["data.eval=null", "evaluation.every_steps=5"],
        "evaluation.every_steps: got 5 with data.eval=null, expected data.eval=SOURCE, or every_steps=0",
    ),
    (
        ["evaluation.greedy=false"],
        "evaluation.samples: got 0 with evaluation.greedy=false, expected at least 1, or greedy=true, "
        "or data.eval=null for no evaluation",
    ),
    (["seed=-1"], "seed: got -1, expected 0 to 4294967294"),
    (["seed=4294967295"], "seed: got 4294967295, expected 0 to 4294967294"),
    (["cluster.object_store_gib=0.01"], "cluster.object_store_gib: got 0.01, expected at least 0.075"),
    (["rollout.stop=['']"], "rollout.stop: got [''], expected texts that are not empty, or []"),
    (["policy.lora.alpha=-3"], "policy.lora.alpha: got -3.0, expected above 0"),
    (["policy.lora.rank=0"], "policy.lora.rank: got 0, expected at least 1"),
    (["policy.adam_eps=-1"], "policy.adam_eps: got -1.0, expected above 0"),
    (["algorithm.correction.bound=-1"], "algorithm.correction.bound: got -1.0, expected at least 0"),
    (["algorithm.entropy_coefficient=-1"], "algorithm.entropy_coefficient: got -1.0, expected at least 0"),
    (
        ["policy.lora.targets=[q_proj,q_prj]"],
        "policy.lora.targets: got 'q_prj', expected names of layers of builtin:smollm2-135m-instruct: down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj (did you mean 'q_proj'?)",
    ),
    (["run_name=a/b"], "run_name: got 'a/b', expected letters, digits and . _ - + = @ (a folder's name, no path)"),
    (
        ["rollout.kv_cache_gib=20"],
        "model.path: got builtin:smollm2-135m-instruct, whose weights, optimiser and caches take 22.8 GiB, "
        "expected at most the 16.0 GiB of this machine; try policy.lora.rank=16, a smaller rollout.kv_cache_gib, "
        "a smaller model, or policy.zero_stage=3 over a cluster",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSALS, ids=[" ".join(overrides) for overrides, _ in REFUSALS])
def test_what_cannot_run_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides, machine=Machine(2, 16 * GIB, 0)) == line


def test_a_group_of_one_is_fine_where_nothing_is_compared():
    assert planned("algorithm=reinforce_pp", "rollout.responses_per_prompt=1").value("trajectories a step") == 8
    baseline = refusal("algorithm=reinforce_pp_baseline", "rollout.responses_per_prompt=1")
    assert baseline.startswith("rollout.responses_per_prompt: got 1 with credit reinforce_pp, ")


@pytest.mark.parametrize(("key", "algorithm"), [("critic.model", "ppo"), ("reference.model", "ppo")])
def test_a_model_beside_the_policy_that_could_not_read_its_sequences_is_refused(tmp_path, key, algorithm):
    def own(**changes):
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 49152, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 64, "max_position_embeddings": 120}
        (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
        return [f"algorithm={algorithm}", f"{key}={tmp_path}"]

    assert planned(*own()).value("tokens a trajectory") == 120
    assert refusal(*own(max_position_embeddings=119)) == (
        f"{key}: got {tmp_path} with a context of 119 tokens, expected at least 120 = data.max_prompt_tokens=96 + "
        "rollout.max_response_tokens=24, or shorter responses"
    )
    assert refusal(*own(vocab_size=49151)) == (
        f"{key}: got {tmp_path} with 49151 tokens, expected at least the 49152 of builtin:smollm2-135m-instruct, with "
        "the same tokenizer: it reads the policy's token ids"
    )


def test_a_cache_too_small_for_one_sequence_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 64, "num_hidden_layers": 64, "vocab_size": 10, "num_attention_heads": 64, "head_dim": 64, '
        '"intermediate_size": 64, "max_position_embeddings": 100000}'
    )
    line = refusal(f"model.path={tmp_path}", "data.max_prompt_tokens=2024", "policy.micro_batch_tokens=2048")
    # 2 x 64 layers x 64 heads x 64 x 2 bytes: a MiB for each token
    assert line == "rollout.kv_cache_gib: got 1, expected at least 2 for one sequence of 2048 tokens"


def test_a_plan_says_when_the_clock_ends_a_run():
    assert "ends after 8.5 minutes at the latest (train.max_minutes)" in planned().notes
    assert not any("minutes" in note for note in planned("train.max_minutes=null").notes)


def test_the_plan_says_when_checkpoints_are_written():
    assert "checkpoints: after 10 min of training without one, at the end; the newest 2 are kept" in planned().notes
    off = ["checkpoint.every_minutes=null", "checkpoint.final=false"]
    assert "no checkpoints" in planned(*off).notes
    assert "checkpoints: after every 3 steps; the newest 2 are kept" in planned(*off, "checkpoint.every_steps=3").notes


EXPECTED = (
    "a .jsonl, .json, .csv or .parquet file, a saved dataset's folder, hf:NAME, gym:TASK, function:NAME or arithmetic"
)


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("nope.jsonl", f"nope.jsonl: no such file or saved dataset; expected {EXPECTED}"),
        ("5", f"data: got 5, expected one or more sources: {EXPECTED}"),
        ("[]", f"data: got [], expected one or more sources: {EXPECTED}"),
        (
            "[{source: a.jsonl, wieght: 2}]",
            "a.jsonl: got 'wieght', a file has no such parameter (did you mean 'weight'?)",
        ),
        (
            "[{source: b.jsonl}]",
            "b.jsonl:1: no column 'prompt', got question, answer; name the right one with prompt_column",
        ),
        ("[{source: saved, wieght: 2}]", "saved: got 'wieght', a saved dataset has no such parameter"),
        ("gym:nosuch", "gym:nosuch: no such reasoning-gym task"),
        ("function:math:sqr", "math:sqr: math has no 'sqr' (did you mean 'sqrt'?)"),
    ],
)
def test_data_that_a_start_would_refuse_are_refused_by_the_plan(key, value, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ApportionError) as error:
        planned(f"{key}={value}")
    assert str(error.value) == line


def test_a_chat_template_that_is_not_there_is_refused_by_the_plan():
    with pytest.raises(ApportionError) as error:
        planned("model.chat_template=nope.jinja")
    assert str(error.value) == "model.chat_template: got 'nope.jinja', no such file; expected a jinja file"


def test_data_that_cannot_be_seen_are_left_to_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": "1"}\nthis line is read by nobody\n')
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for source in ("hf:nobody/nothing", "saved", "a.jsonl", "function:math:sqrt"):
        assert planned(f"data.train={source}", "data.eval=null").value("optimiser steps") == 40


def test_targets_are_held_against_the_layers_that_the_weights_name(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    assert not planned("model.path=nobody/nothing", "policy.lora.targets=[anything]").actor("policy").memory_known
    assert not planned(f"model.path={tmp_path}", "policy.lora.targets=[anything]").actor("policy").memory_known
    layers = ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight")
    save_file({name: torch.zeros(2, 2) for name in layers} | {"ln.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    assert not planned(f"model.path={tmp_path}", "policy.lora.targets=[attn.c_attn]").actor("policy").memory_known
    line = refusal(f"model.path={tmp_path}", "policy.lora.targets=[q_proj]")
    assert line == f"policy.lora.targets: got 'q_proj', expected names of layers of {tmp_path}: c_attn, wte"


def test_targets_are_not_held_against_weights_of_which_some_may_be_missing_or_quantised(tmp_path):
    import torch
    from safetensors.torch import save_file

    words = (f"model.path={tmp_path}", "policy.lora.targets=[q_proj]")
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"lm_head.weight": torch.zeros(2, 2)}, shard)
    assert planned(*words).actor("policy").count == 1
    index = {"weight_map": {"lm_head.weight": shard.name, "q_proj.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(*words) == (
        f"model.path: got {tmp_path}, whose index names model-00001-of-00002.safetensors, which is not there, expected all "
        "parts of the weights: fetch that file"
    )
    index["weight_map"].pop("q_proj.weight")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(*words).startswith("policy.lora.targets: got 'q_proj', expected names of layers")
    (tmp_path / "config.json").write_text('{"vocab_size": 9, "quantization_config": {"quant_method": "gptq"}}')
    assert planned(*words).actor("policy").count == 1


def test_a_model_whose_sizes_are_in_other_words_is_held_to_its_context_all_the_same(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 99, "n_positions": 100, "n_embd": 8}')
    assert refusal(f"model.path={tmp_path}").startswith("rollout.max_response_tokens: got data.max_prompt_tokens=96 + ")
    assert refusal("algorithm=ppo", f"reference.model={tmp_path}") == (
        f"reference.model: got {tmp_path} with a context of 100 tokens, expected at least 120 = data.max_prompt_tokens=96 "
        "+ rollout.max_response_tokens=24, or shorter responses"
    )


def test_a_mixture_of_experts_for_which_syncs_are_not_proved_is_refused_by_name(tmp_path):
    config = {"architectures": ["GptOssForCausalLM"], "num_local_experts": 32, "vocab_size": 264}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(f"model.path={tmp_path}").startswith(
        f"model.path: got {tmp_path} (GptOssForCausalLM), a mixture of experts for which weight syncs to vLLM are not proved; "
    )
