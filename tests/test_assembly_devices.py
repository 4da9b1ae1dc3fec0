"""Which GPUs each actor asks for and sees, and which distributions are refused before anything starts."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from apportion.assembly import hosts, starting
from apportion.assembly.needs import needs_of
from apportion.assembly.serving import judge_requests, serving_requests
from apportion.assembly.starting import join
from apportion.assembly.training import critic_requests, policy_requests, reference_requests
from apportion.cli import compose_config, to_config
from apportion.conf import devices, judges
from apportion.conf.devices import check_heads, check_in_use, engine_bytes, fit, in_use
from apportion.conf.machine import GIB, Machine
from apportion.conf.models import read_model
from apportion.plan import make_plan
from apportion.platform import cluster
from apportion.platform.cluster import Actor, Cluster
from apportion.platform.cuda import Gpu
from apportion.platform.errors import ConfigError
from apportion.platform.process import ProcessInfo
from apportion.platform.runs import RunFolder

MACHINE = Machine(16, 2**37, 8)
HIDDEN = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
JUDGE = [
    "algorithm=capo",
    "judge.model=builtin:tiny",
    "judge.function=null",
    "judge.context_tokens=1024",
    "judge.max_tokens=256",
]


def composed(*overrides):
    return to_config(compose_config(["experiment=tiny_ppo", *overrides]))[0]


def requests(config, tmp_path):
    """(GPUs asked for, whether the node's are hidden) of each role."""
    asked = serving_requests(config, "m", needs_of(config))
    asked |= {"policy": policy_requests(config, "m"), "critic": critic_requests(config, "m")}
    asked |= {"reference": reference_requests(config, "m"), "judge": judge_requests(config, "m", RunFolder(tmp_path))}
    shown = {}
    for role, several in asked.items():
        for one in several:
            environment = one.environment or {}
            hidden = {name: environment[name] for name in HIDDEN if name in environment}
            assert hidden in ({}, HIDDEN)
            shown[role] = (one.gpus, bool(hidden))
    return shown


def test_an_actor_without_a_gpu_of_its_own_sees_none(tmp_path):
    shown = requests(composed("environment.cls=microwave", *JUDGE), tmp_path)
    roles = ["rollout", "reward", "credit", "environment", "policy", "critic", "reference", "judge"]
    assert shown == dict.fromkeys(roles, (0, True))


def test_gpus_that_are_asked_for_are_seen(tmp_path):
    roles = ("policy_rank", "critic_rank", "reference_rank", "rollout_engine", "reward_worker", "judge")
    config = composed(*[f"cluster.gpus_per_{role}=1" for role in roles], *JUDGE)
    shown = requests(config, tmp_path)
    assert {role: shown[role] for role in shown if role != "credit"} == dict.fromkeys(
        shown.keys() - {"credit"}, (1, False)
    )
    assert sum(actor.count * actor.gpus for actor in make_plan(config, MACHINE).actors) == 4  # no critic, no reference


def test_each_role_has_threads_for_its_share_of_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts.machine, "this_machine", lambda: Machine(96, 2**37, 8))
    shares = {"policy_rank": 1, "critic_rank": 0.5, "reference_rank": 0.25, "rollout_engine": 2, "judge": 1}
    words = [f"cluster.gpus_per_{role}={gpus}" for role, gpus in shares.items()]
    config = composed(*words, "rollout.tensor_parallel_size=2", *JUDGE)
    rollout = serving_requests(config, "m", needs_of(config))["rollout"][0]
    policy, critic = policy_requests(config, "m")[0], critic_requests(config, "m")[0]
    reference, judge = reference_requests(config, "m")[0], judge_requests(config, "m", RunFolder(tmp_path))[0]
    requests = (policy, critic, reference, rollout, judge)
    assert [one.environment["OMP_NUM_THREADS"] for one in requests] == ["12", "6", "3", "24", "12"]
    assert reference.arguments[0].threads == 3
    assert rollout.arguments[0].engine_spec.threads == 24
    assert judge.arguments[0].model.engine_spec.threads == 12


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("own", "engines", "rollout", "judge", "others"),
    [
        ({}, 1, ("PASSIVE", "300000"), ("PASSIVE", "1000"), ("PASSIVE", None)),
        ({}, 2, ("PASSIVE", "1000"), ("PASSIVE", "1000"), ("PASSIVE", None)),
        ({"GOMP_SPINCOUNT": "7"}, 1, ("PASSIVE", "7"), ("PASSIVE", "7"), ("PASSIVE", None)),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 1, ("ACTIVE", None), ("ACTIVE", None), ("ACTIVE", None)),
    ],
)
def test_threads_of_engines_look_out_a_moment_for_their_next_part_and_others_sleep(
    own, engines, rollout, judge, others, tmp_path, monkeypatch
):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    config = composed(f"cluster.rollout_engines={engines}", *JUDGE)
    asked = serving_requests(config, "m", needs_of(config)) | {"policy": policy_requests(config, "m")}
    asked |= {"critic": critic_requests(config, "m"), "judge": judge_requests(config, "m", RunFolder(tmp_path))}
    shown = {role: {tuple(one.environment.get(name) for name in WAITING) for one in asked[role]} for role in asked}
    assert {role: shown[role] for role in ("rollout", "judge", "policy", "critic")} == {
        "rollout": {rollout}, "judge": {judge}, "policy": {others}, "critic": {others},
    }  # fmt: skip


GPU_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
GROWING = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
REPEATABLE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize(
    ("own", "deterministic", "training"),
    [
        ({}, False, [GROWING]),
        ({}, True, [GROWING, REPEATABLE]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, True, [REPEATABLE]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}, True, []),
    ],
)
def test_ranks_on_gpus_get_what_torch_needs_there_and_engines_and_cpus_do_not(
    own, deterministic, training, tmp_path, monkeypatch
):
    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)

    def shown(gpus: int) -> dict:
        roles = ("policy_rank", "critic_rank", "reference_rank", "rollout_engine", "judge")
        words = [f"cluster.gpus_per_{role}={gpus}" for role in roles]
        config = composed(f"train.deterministic={deterministic}", *words, *JUDGE)
        asked = [*policy_requests(config, "m"), *critic_requests(config, "m"), *reference_requests(config, "m")]
        asked += [*judge_requests(config, "m", RunFolder(tmp_path))]
        asked += serving_requests(config, "m", needs_of(config))["rollout"]
        return {one.name: [(n, v) for n, v in one.environment.items() if n in GPU_VARIABLES] for one in asked}

    ranks, engines = ("policy-0", "critic-0", "reference-0"), ("judge-0", "rollout-0")
    assert shown(1) == {name: training if name in ranks else [] for name in (*ranks, *engines)}
    assert shown(0) == {name: [] for name in (*ranks, *engines)}


REFUSED = [
    (
        ["cluster.policy_ranks=2", "cluster.gpus_per_policy_rank=0.5"],
        "cluster.gpus_per_policy_rank: got 0.5 with cluster.policy_ranks=2, expected 1: ranks that train together cannot "
        "share a GPU",
    ),
    (
        ["cluster.policy_ranks=2", "cluster.gpus_per_critic_rank=0.5"],
        "cluster.gpus_per_critic_rank: got 0.5 with cluster.policy_ranks=2, expected 1: ranks that train together cannot "
        "share a GPU",
    ),
    (
        ["cluster.gpus_per_reward_worker=1.5"],
        "cluster.gpus_per_reward_worker: got 1.5, expected a part of one GPU or a whole number",
    ),
    (
        ["model.attention=flash_attention_2", "cluster.gpus_per_policy_rank=1", "cluster.gpus_per_critic_rank=1"],
        "model.attention: got flash_attention_2 with cluster.gpus_per_reference_rank=0, expected sdpa or eager, or a GPU",
    ),
    (
        [
            "algorithm=grpo",
            "cluster.rollout_engines=3",
            "cluster.gpus_per_rollout_engine=0.6",
            "cluster.policy_ranks=6",
            "cluster.gpus_per_policy_rank=1",
            "train.prompts_per_step=6",
        ],
        "cluster: got 7.8 GPUs over all actors, expected what fits the 8 of this machine (a part of a GPU is on one GPU, and "
        "an actor's GPUs are on one node); lower cluster.gpus_per_*, or join a cluster with cluster.address",
    ),
    (
        ["algorithm=grpo", "model.attention=flash_attention_2", "cluster.gpus_per_policy_rank=1"],
        "model.attention: got flash_attention_2, and neither the package flash-attn nor kernels is installed, expected "
        "sdpa (on GPUs torch's own flash kernels) or one of them",
    ),
]


# Of one role alone: the recipe has a policy, a critic and a reference.
ON_GPUS = ["cluster.gpus_per_policy_rank=1", "cluster.gpus_per_critic_rank=1", "cluster.gpus_per_reference_rank=1"]
TOO_MANY = "expected 1: a rank uses one GPU; for more GPUs set"
REFUSED += [
    (
        ["cluster.gpus_per_policy_rank=1", "cluster.gpus_per_reference_rank=1"],
        "cluster.gpus_per_critic_rank: got 0 with cluster.gpus_per_policy_rank=1, expected a GPU for the critic too, 1 or a "
        "part of one: on the CPU it would take most of each step",
    ),
    (
        ["cluster.gpus_per_policy_rank=0.5", "cluster.gpus_per_critic_rank=1"],
        "cluster.gpus_per_reference_rank: got 0 with cluster.gpus_per_policy_rank=0.5, expected a GPU for the reference too, "
        "1 or a part of one: on the CPU it would take most of each step",
    ),
    (
        ["cluster.gpus_per_rollout_engine=1"],
        "cluster.gpus_per_policy_rank: got 0 with cluster.gpus_per_rollout_engine=1, expected a GPU for the policy too, 1 or "
        "a part of one: on the CPU its updates would take most of each step",
    ),
    (
        ["cluster.gpus_per_reference_rank=0.5"],
        "cluster.gpus_per_policy_rank: got 0 with cluster.gpus_per_reference_rank=0.5, expected a GPU for the policy too, 1 "
        "or a part of one: on the CPU its updates would take most of each step",
    ),
    (
        ["cluster.policy_ranks=2", "cluster.gpus_per_policy_rank=1"],
        "cluster.gpus_per_critic_rank: got 0 with cluster.gpus_per_policy_rank=1, expected a GPU for the critic too, 1: on "
        "the CPU it would take most of each step",
    ),
    (["cluster.policy_ranks=2", "cluster.gpus_per_policy_rank=2"],
     f"cluster.gpus_per_policy_rank: got 2, {TOO_MANY} cluster.policy_ranks=4"),
    ([*ON_GPUS, "cluster.gpus_per_critic_rank=8"],
     f"cluster.gpus_per_critic_rank: got 8, {TOO_MANY} cluster.policy_ranks=8"),
    ([*ON_GPUS, "cluster.reference_ranks=2", "cluster.gpus_per_reference_rank=3"],
     f"cluster.gpus_per_reference_rank: got 3, {TOO_MANY} cluster.reference_ranks=6"),
    (
        [*ON_GPUS, "cluster.gpus_per_rollout_engine=4", "rollout.tensor_parallel_size=2"],
        "cluster.gpus_per_rollout_engine: got 4 with rollout.tensor_parallel_size=2, expected 2: an engine uses a GPU for "
        "each part of its model; for more GPUs raise cluster.rollout_engines or rollout.tensor_parallel_size",
    ),
    (
        [*ON_GPUS, *JUDGE, "cluster.gpus_per_judge=2"],
        "cluster.gpus_per_judge: got 2 with judge.tensor_parallel_size=1, expected 1: an engine uses a GPU for each part of "
        "its model; for more GPUs raise judge.workers or judge.tensor_parallel_size",
    ),
    (
        [*ON_GPUS, *JUDGE, "cluster.gpus_per_judge=16", "judge.tensor_parallel_size=16", "judge.engine=vllm"],
        "judge.tensor_parallel_size: got 16, expected at most 8, the GPUs of this machine: an engine's GPUs are on one node",
    ),
    (
        [*ON_GPUS, "cluster.policy_ranks=9", "train.prompts_per_step=9"],
        "cluster.policy_ranks: got 9 with cluster.gpus_per_policy_rank=1, expected at most 8, one for each GPU of this "
        "machine",
    ),
    (
        [*ON_GPUS, "cluster.gpus_per_rollout_engine=16", "rollout.tensor_parallel_size=16"],
        "rollout.tensor_parallel_size: got 16, expected at most 8, the GPUs of this machine: an engine's GPUs are on one node",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[words[-1] for words, _ in REFUSED])
def test_a_distribution_that_cannot_run_is_refused(overrides, message, monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None if "neither" in message else name)
    with pytest.raises(ConfigError) as error:
        make_plan(composed(*overrides), MACHINE)
    assert str(error.value) == message


def test_one_rank_may_take_a_part_of_a_gpu():
    words = [f"cluster.gpus_per_{role}_rank=0.5" for role in ("policy", "critic", "reference")]
    assert make_plan(composed(*words), MACHINE).actor("policy").gpus == 0.5


@pytest.mark.parametrize(
    "word",
    [
        "cluster.gpus_per_policy_rank=0.5",
        "cluster.gpus_per_policy_rank=2",
        "model.attention=flash_attention_2",
        "policy.offload_optimizer=true",
    ],
)
def test_a_preference_stage_refuses_the_same(word):
    from apportion.conf.preference_schema import check

    words = ["model.path=builtin:tiny", "data.train=x.jsonl", "cluster.policy_ranks=2", "train.batch_size=4", word]
    with pytest.raises(ConfigError, match=word.replace("=", ": got ")):
        check(to_config(compose_config(words, stage="dpo"))[0])


def test_a_preference_stage_is_held_against_the_machine(monkeypatch):
    from apportion.conf.preference_schema import check

    def said(machine, *words):
        common = [
            "model.path=builtin:tiny",
            "data.train=x.jsonl",
            "train.batch_size=4",
            "cluster.gpus_per_policy_rank=1",
        ]
        config = to_config(compose_config([*common, *words], stage="dpo"))[0]
        try:
            check(config, machine)
        except ConfigError as error:
            return str(error)
        return None

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert said(machine_of(A100)) is None
    assert said(machine_of(A100), "cluster.policy_ranks=2") == (
        "cluster.policy_ranks: got 2 with cluster.gpus_per_policy_rank=1, expected at most 1, one for each GPU of this machine"
    )
    assert said(machine_of(A100), "cluster.policy_ranks=2", "cluster.address=10.0.0.1:6379") is None
    assert said(machine_of(T4), "model.dtype=bfloat16").startswith("model.dtype: got bfloat16 on Tesla T4")
    assert said(Machine(2, 2**33, 0, no_gpu="CUDA_VISIBLE_DEVICES is ''")) == (
        "cluster: got 1 GPUs over all actors, expected what fits the 0 of this machine (CUDA_VISIBLE_DEVICES is ''); lower "
        "cluster.gpus_per_*, or join a cluster with cluster.address"
    )


def test_a_vllm_built_for_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "vllm_needs_gpu", lambda: True)
    with pytest.raises(ConfigError, match="gpus_per_rollout_engine: got 0 with a vLLM that was built for CUDA"):
        make_plan(composed(), MACHINE)
    make_plan(composed("rollout.engine=transformers"), MACHINE)
    monkeypatch.setattr(judges, "vllm_needs_gpu", lambda: True)
    with pytest.raises(ConfigError, match="gpus_per_judge: got 0 with a vLLM that was built for CUDA"):
        make_plan(composed("cluster.gpus_per_rollout_engine=1", "cluster.gpus_per_policy_rank=1", *JUDGE), MACHINE)


@pytest.mark.parametrize(
    ("installed", "needs"), [({"vllm": "0.32.0"}, True), ({"vllm": "0.32.0+cpu"}, False), ({}, False)]
)
def test_what_vllm_was_built_for_is_read_from_what_is_installed(monkeypatch, installed, needs):
    def version(name):
        if name not in installed:
            raise devices.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(devices, "version", version)
    assert devices.vllm_needs_gpu() is needs


def test_a_plan_says_what_stays_on_cpus_beside_gpus():
    notes = make_plan(composed(*ON_GPUS), MACHINE).notes
    assert "on CPUs while others have GPUs: rollout (cluster.gpus_per_*)" in notes
    scored = make_plan(composed(*ON_GPUS, "reward.functions=model:builtin:tiny"), MACHINE).notes
    assert "on CPUs while others have GPUs: rollout, reward (cluster.gpus_per_*)" in scored
    assert not any("while others" in note for note in make_plan(composed(), MACHINE).notes)


T4 = Gpu("Tesla T4", 15 * GIB, (7, 5))
A100 = Gpu("NVIDIA A100-SXM4-80GB", round(79.1 * GIB), (8, 0))


def machine_of(*gpus, **changes):
    from apportion.platform.cuda import least

    return Machine(16, 2**37, len(gpus), least(gpus), devices=gpus, **changes)


def refusal(machine, *overrides):
    with pytest.raises(ConfigError) as error:
        make_plan(composed(*overrides), machine)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bfloat16_on_a_gpu_without_it_is_refused_for_roles_on_a_gpu():
    cpu = "expected float16 or float32, or another GPU, of 8.0 or more (CUDA_VISIBLE_DEVICES chooses)"
    line = f"got bfloat16 on Tesla T4 of compute capability 7.5, {cpu}"
    bf16 = "model.dtype=bfloat16"
    assert refusal(machine_of(T4, T4, T4), *ON_GPUS, bf16) == f"model.dtype: {line}"
    assert refusal(machine_of(A100, A100, T4), *ON_GPUS, bf16) == f"model.dtype: {line}"  # whichever a role may get
    v100 = Gpu("Tesla V100-SXM2-16GB", 16 * GIB, (7, 0))
    assert "on Tesla V100-SXM2-16GB of compute capability 7.0" in refusal(machine_of(v100, v100, v100), *ON_GPUS, bf16)
    for dtype in ("float16", "float32"):
        make_plan(composed(*ON_GPUS, f"model.dtype={dtype}"), machine_of(T4, T4, T4))
    make_plan(composed(bf16), machine_of(T4))  # on the CPU
    make_plan(composed(*ON_GPUS, bf16), machine_of(A100, A100, A100))
    make_plan(composed(*ON_GPUS, bf16), Machine(16, 2**37, 3))  # nothing is known of them
    judged = [*JUDGE, "judge.engine=transformers", "cluster.gpus_per_judge=1"]
    assert refusal(machine_of(T4), *judged, bf16, "judge.dtype=bfloat16") == f"judge.dtype: {line}"
    make_plan(composed(*judged, bf16, "judge.dtype=float32"), machine_of(T4))
    make_plan(composed(*judged[:-1], bf16, "judge.dtype=bfloat16"), machine_of(T4))


def test_gpus_that_cuda_does_not_show_are_refused_with_the_drivers_words():
    assert refusal(Machine(16, 2**37, 0, no_gpu="the CUDA driver crashes (signal 11)"), *ON_GPUS) == (
        "cluster: got 3 GPUs over all actors, expected what fits the 0 of this machine (the CUDA driver crashes (signal "
        "11)); lower cluster.gpus_per_*, or join a cluster with cluster.address"
    )


def test_actors_are_laid_out_over_nodes(tmp_path):
    nodes = Machine(16, 2**37, 8, A100, nodes=2, devices=(A100,) * 8, assumed="two nodes")
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 24,
        "vocab_size": 264,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "qwen2"}))
    whole = [f"model.path={tmp_path}"]  # 24 heads are for 8 parts and for 6
    engine = [*whole, "cluster.gpus_per_rollout_engine=8", "rollout.tensor_parallel_size=8"]
    assert make_plan(composed("algorithm=grpo", ON_GPUS[0], *engine), nodes).actor("rollout").gpus == 8
    assert refusal(nodes, *ON_GPUS, "cluster.gpus_per_rollout_engine=9", "rollout.tensor_parallel_size=9") == (
        "rollout.tensor_parallel_size: got 9, expected at most 8, the GPUs of a node: an engine's GPUs are on one node"
    )
    ranks = ["algorithm=grpo", "train.prompts_per_step=12", ON_GPUS[0]]
    assert refusal(nodes, *ranks, "cluster.policy_ranks=17", "train.prompts_per_step=17") == (
        "cluster.policy_ranks: got 17 with cluster.gpus_per_policy_rank=1, expected at most 16, one for each GPU of 2 nodes"
    )
    six = [*whole, "cluster.gpus_per_rollout_engine=6", "rollout.tensor_parallel_size=6", "cluster.rollout_engines=2"]
    make_plan(composed(*ranks, *six, "cluster.policy_ranks=4"), nodes)
    assert refusal(nodes, *ranks, *six, "cluster.policy_ranks=5") == (
        "cluster: got 17 GPUs over all actors, expected what fits the 16 of 2 nodes; lower cluster.gpus_per_*, or join a "
        "cluster with cluster.address"
    )


@pytest.mark.parametrize(
    ("section", "parts", "sizes"),
    [
        ("rollout", 3, "1 or 2 or 4"),
        ("rollout", 8, "1 or 2 or 4"),
        ("judge", 3, "1 or 2 or 4"),
    ],
)
def test_parts_of_a_model_have_as_many_heads(section, parts, sizes):
    """builtin:tiny has four heads and two key-value heads; vLLM refuses others while it starts."""
    gpus = "rollout_engine" if section == "rollout" else "judge"
    words = [*ON_GPUS, *JUDGE, "judge.engine=vllm", f"{section}.tensor_parallel_size={parts}"]
    line = refusal(Machine(16, 2**37, 32), *words, f"cluster.gpus_per_{gpus}={parts}")
    assert line == (
        f"{section}.tensor_parallel_size: got {parts}, expected {sizes}: the model's 4 attention heads and 2 key-value "
        "heads are dealt out evenly"
    )


def test_key_value_heads_bound_the_parts_too():
    model = read_model("builtin:smollm2-135m-instruct")  # nine heads, three key-value heads
    for parts in (1, 3, 9):
        check_heads("rollout", parts, model)
    with pytest.raises(ConfigError, match="got 2, expected 1 or 3 or 9: "):
        check_heads("rollout", 2, model)
    seven = replace(model, key_value_heads=4, shapes=model.shapes | {"q_proj": (576, 28 * 64)})
    with pytest.raises(ConfigError, match="got 7, expected 1 or 2 or 4 or 28: "):
        check_heads("rollout", 7, seven)
    check_heads("rollout", 7, None)


@pytest.mark.parametrize(
    ("shares", "devices", "nodes", "fits"),
    [
        ([1, 1], 2, 1, True), ([1, 1, 0.1], 2, 1, False), ([8, 8], 8, 2, True), ([8, 8], 16, 1, True), ([9], 8, 2, False),
        ([4, 4, 4, 4], 8, 2, True), ([6, 6, 4], 8, 2, False), ([6, 6, 1, 1, 0.5, 0.5, 1], 8, 2, True),
        ([6, 6, 1, 1, 1, 0.6, 0.6], 8, 2, False), ([0, 0], 0, 1, True), ([0.5], 0, 1, False),
    ],
)  # fmt: skip
def test_what_fits_on_nodes(shares, devices, nodes, fits):
    assert fit(shares, devices, nodes) is fits


def test_a_gpu_that_another_run_uses_is_refused_and_noted_by_the_plan():
    used = [Gpu(A100.name, A100.memory_bytes, A100.capability, bytes_) for bytes_ in (0, round(8.2 * GIB), None)]
    machine, words = machine_of(*used), [*ON_GPUS, "cluster.gpus_per_rollout_engine=1"]
    line = (
        "GPU 1: got 8.2 GiB in use by other processes and 71.2 GiB planned, expected at most 79.1 GiB together: end what "
        "runs there (nvidia-smi lists it), or choose another GPU with CUDA_VISIBLE_DEVICES"
    )
    config = composed(*words, "cluster.rollout_engines=2")
    assert engine_bytes(config, machine) == [round(0.9 * A100.memory_bytes)] * 2
    with pytest.raises(ConfigError) as error:
        check_in_use(machine, engine_bytes(config, machine))
    assert str(error.value) == line
    check_in_use(machine, [A100.memory_bytes, A100.memory_bytes - round(8.2 * GIB), A100.memory_bytes])
    assert in_use(machine, [0, A100.memory_bytes - round(8.2 * GIB) + 1]).startswith("GPU 1: got 8.2 GiB in use")
    assert in_use(Machine(16, 2**37, 3), [A100.memory_bytes] * 3) is None  # nothing is known of them
    four = machine_of(*used, A100, A100)
    noted = line.replace("71.2", "71.7")  # with its process's CUDA context
    assert f"{noted}; `apportion train` refuses to start until then" in make_plan(config, four).notes
    assert not any("in use" in note for note in make_plan(composed(*words), four).notes)  # its engine is on the first


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cluster.gpus_per_rollout_engine=0"], []),
        (["cluster.gpus_per_rollout_engine=0.5"], [0.4]),
        (["cluster.gpus_per_rollout_engine=0.5", "cluster.rollout_engines=3"], [0.8, 0.8]),
        (["cluster.gpus_per_rollout_engine=2", "rollout.tensor_parallel_size=2"], [0.9, 0.9]),
        (["cluster.gpus_per_rollout_engine=1", "rollout.gpu_memory_utilization=0.3"], [0.3]),
        (["cluster.gpus_per_rollout_engine=1", "rollout.engine=transformers"], []),
    ],
)
def test_engines_take_their_share_of_each_gpu(words, expected):
    machine = machine_of(A100, A100, A100)
    assert engine_bytes(composed(*words), machine) == [round(share * A100.memory_bytes) for share in expected]


BUSY = Gpu(A100.name, A100.memory_bytes, A100.capability, 40 * GIB)


def test_train_refuses_a_gpu_in_use_before_anything_starts_and_plan_notes_it(monkeypatch, capsys):
    from apportion import build, plan
    from apportion.cli import main

    for module in (plan, devices):
        monkeypatch.setattr(module, "this_machine", lambda: machine_of(BUSY))
    monkeypatch.setattr(build, "train", lambda *_: pytest.fail("the run was built"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["experiment=tiny_grpo", "cluster.gpus_per_policy_rank=0.5", "cluster.gpus_per_rollout_engine=0.5"]
    assert main(["train", *words, "rollout.gpu_memory_utilization=0.6"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: GPU 0: got 40.0 GiB in use by other processes and 48.5 GiB planned"
    )
    assert main(["plan", *words, "rollout.gpu_memory_utilization=0.6"]) == 0
    assert "GPU 0: got 40.0 GiB in use" in capsys.readouterr().out
    monkeypatch.setattr(build, "train", lambda *_: 0)
    assert main(["train", *words, "rollout.gpu_memory_utilization=0.4"]) == 0


@pytest.mark.parametrize(
    ("gpus", "words", "line"),
    [
        ([BUSY], [], "GPU 0: got 40.0 GiB in use by other processes and 71.2 GiB planned, "),
        ([T4], ["model.dtype=bfloat16"], "model.dtype: got bfloat16 on Tesla T4 of compute capability 7.5, "),
        (
            [A100],
            ["cluster.rollout_engines=2"],
            "cluster: got 2 GPUs over all actors, expected what fits the 1 of this",
        ),
        (
            [A100],
            ["cluster.gpus_per_reward_worker=0.5"],
            "cluster: got 1.5 GPUs over all actors, expected what fits the 1",
        ),
        (
            [A100],
            ["cluster.gpus_per_rollout_engine=2"],
            "cluster.gpus_per_rollout_engine: got 2 with rollout.tensor_par",
        ),
        ([A100], [], "checkpoint: got 'nowhere', "),  # the checkpoint that is not there
    ],
)
def test_an_evaluation_is_held_against_the_machine(gpus, words, line, monkeypatch):
    from apportion import build

    monkeypatch.setattr(devices, "this_machine", lambda: machine_of(*gpus))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError) as error:
        build.evaluate(composed("cluster.gpus_per_rollout_engine=1", *words), "nowhere")
    assert str(error.value).startswith(line)


def test_ranks_wait_for_each_other_as_long_as_anyone_waits_for_them(monkeypatch):
    monkeypatch.setattr(starting, "gather", lambda calls, seconds, what: [("127.0.0.1", 29500)])
    rank = SimpleNamespace(call=lambda method, argument: argument)

    def limits(*overrides):
        worlds = join(SimpleNamespace(joined=False), [rank, rank], composed(*overrides).cluster, 7, True, 3)
        assert [(w.rank, w.size, w.master_port, w.seed, w.deterministic, w.threads) for w in worlds] == [
            (0, 2, 29500, 7, True, 3), (1, 2, 29500, 7, True, 3)
        ]  # fmt: skip
        return [world.timeout_seconds for world in worlds]

    assert limits() == [1800, 1800]
    assert limits("cluster.start_timeout_seconds=2400") == [2400, 2400]


@pytest.mark.parametrize(("joined", "seen"), [(True, [True, False]), (False, None), (True, [True, True])])
def test_a_run_folder_that_a_rank_does_not_see_is_refused(monkeypatch, tmp_path, joined, seen):
    asked = []

    def gather(calls, seconds, what):
        asked.extend(calls)
        assert [Path(call.refs[0]).is_file() for call in calls] == [True, True]
        return seen

    monkeypatch.setattr(cluster, "gather", gather)
    ranks = [
        Actor(f"policy-{i}", SimpleNamespace(sees=SimpleNamespace(remote=lambda file: file)), f"{i}.log")
        for i in range(2)
    ]
    for rank in ranks:
        rank.info = ProcessInfo(1, "node-b", "")

    def check():
        Cluster.check_shared(SimpleNamespace(joined=joined), ranks, tmp_path, 5)

    if seen == [True, False]:
        with pytest.raises(
            ConfigError, match=r"where policy-1 on node-b does not find what is written here, expected a folder"
        ):
            check()
    else:
        check()
    assert len(asked) == (2 if joined else 0)
    assert list(tmp_path.iterdir()) == []


def test_an_actor_sees_the_files_of_its_node(tmp_path):
    from apportion.platform.process import ActorBase

    (tmp_path / "here").write_text("x")
    actor = ActorBase()
    assert actor.sees(str(tmp_path / "here")) and not actor.sees(str(tmp_path / "there"))
