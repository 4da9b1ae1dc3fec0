"""Which GPUs each actor asks for and sees, and which distributions are refused before anything starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from apportion.assembly import starting
from apportion.assembly.needs import needs_of
from apportion.assembly.serving import judge_requests, serving_requests
from apportion.assembly.starting import join
from apportion.assembly.training import critic_requests, policy_requests, reference_requests
from apportion.cli import compose_config, to_config
from apportion.conf import devices, judges
from apportion.conf.devices import Machine
from apportion.plan import make_plan
from apportion.platform import cluster
from apportion.platform.cluster import Actor, Cluster
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
        ["cluster.rollout_engines=3", "cluster.gpus_per_rollout_engine=0.6", "cluster.gpus_per_policy_rank=6"],
        "cluster: got 7.8 GPUs over all actors, expected what fits the 8 of this machine; lower cluster.gpus_per_*, or join "
        "a cluster with cluster.address",
    ),
    (
        ["algorithm=grpo", "model.attention=flash_attention_2", "cluster.gpus_per_policy_rank=1"],
        "model.attention: got flash_attention_2, and neither the package flash-attn nor kernels is installed, expected "
        "sdpa (on GPUs torch's own flash kernels) or one of them",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[words[-1] for words, _ in REFUSED])
def test_a_distribution_that_cannot_run_is_refused(overrides, message, monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None if "neither" in message else name)
    with pytest.raises(ConfigError) as error:
        make_plan(composed(*overrides), MACHINE)
    assert str(error.value) == message


def test_one_rank_may_take_a_part_of_a_gpu():
    assert make_plan(composed("cluster.gpus_per_policy_rank=0.5"), MACHINE).actor("policy").gpus == 0.5


@pytest.mark.parametrize("word", ["cluster.gpus_per_policy_rank=0.5", "model.attention=flash_attention_2"])
def test_a_preference_stage_refuses_the_same(word):
    from apportion.conf.preference_schema import check

    words = ["model.path=builtin:tiny", "data.train=x.jsonl", "cluster.policy_ranks=2", "train.batch_size=4", word]
    with pytest.raises(ConfigError, match=word.replace("=", ": got ")):
        check(to_config(compose_config(words, stage="dpo"))[0])


def test_a_vllm_built_for_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "vllm_needs_gpu", lambda: True)
    with pytest.raises(ConfigError, match="gpus_per_rollout_engine: got 0 with a vLLM that was built for CUDA"):
        make_plan(composed(), MACHINE)
    make_plan(composed("rollout.engine=transformers"), MACHINE)
    monkeypatch.setattr(judges, "vllm_needs_gpu", lambda: True)
    with pytest.raises(ConfigError, match="gpus_per_judge: got 0 with a vLLM that was built for CUDA"):
        make_plan(composed("cluster.gpus_per_rollout_engine=1", *JUDGE), MACHINE)


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
    notes = make_plan(composed("cluster.gpus_per_policy_rank=1"), MACHINE).notes
    assert "on CPUs while others have GPUs: critic, reference (cluster.gpus_per_*)" in notes
    scored = make_plan(composed("cluster.gpus_per_policy_rank=1", "reward.functions=model:builtin:tiny"), MACHINE).notes
    assert "on CPUs while others have GPUs: critic, reference, reward (cluster.gpus_per_*)" in scored
    assert not any("while others" in note for note in make_plan(composed(), MACHINE).notes)


def test_ranks_wait_for_each_other_as_long_as_anyone_waits_for_them(monkeypatch):
    monkeypatch.setattr(starting, "gather", lambda calls, seconds, what: [("127.0.0.1", 29500)])
    rank = SimpleNamespace(call=lambda method, argument: argument)

    def limits(*overrides):
        worlds = join(SimpleNamespace(joined=False), [rank, rank], composed(*overrides).cluster, 7, True)
        assert [(w.rank, w.size, w.master_port, w.seed, w.deterministic) for w in worlds] == [
            (0, 2, 29500, 7, True), (1, 2, 29500, 7, True)
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
