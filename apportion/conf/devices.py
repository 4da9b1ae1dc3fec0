"""Refuses a distribution over GPUs that cannot run. Each check says got, expected and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import ceil

from apportion.conf.defaults import rollout_settings
from apportion.conf.machine import GIB, Machine, joins, this_machine
from apportion.conf.models import ModelFacts, check_rows_of_several
from apportion.conf.placement import GpuUse, firm_bytes
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError

BFLOAT16 = (8, 0)  # the compute capability that has it


def check_devices(config: Config, needs: frozenset[str], machine: Machine | None, gpus: Sequence[float]) -> None:
    """`machine` is None where the cluster is not this machine; `gpus` is what each actor asks for."""
    cluster = config.cluster
    there = _roles(needs)
    for role, count in (("policy", cluster.gpus_per_policy_rank), ("critic", cluster.gpus_per_critic_rank)):
        settings = config.policy if role == "policy" else config.critic
        check_offload(role, settings.offload_optimizer, count)
    check_ranks("cluster.gpus_per_policy_rank", cluster.gpus_per_policy_rank, cluster.policy_ranks)
    check_ranks("cluster.gpus_per_critic_rank", cluster.gpus_per_critic_rank, cluster.policy_ranks)
    check_share("cluster.gpus_per_reference_rank", cluster.gpus_per_reference_rank)
    _check_one_gpu("cluster.gpus_per_reference_rank", cluster.gpus_per_reference_rank, cluster.reference_ranks,
                   "cluster.reference_ranks")  # fmt: skip
    for role in ("judge", "reward_worker"):
        check_share(f"cluster.gpus_per_{role}", getattr(cluster, f"gpus_per_{role}"))
    for role in ("policy", "critic", "reference"):
        key = f"gpus_per_{role}_rank"
        if role in there:
            check_attention(config.model.attention, f"cluster.{key}", getattr(cluster, key))
    check_engine(config)
    if cluster.weight_transfer == "broadcast":
        _check_broadcast(cluster.gpus_per_policy_rank, cluster.gpus_per_rollout_engine)
    if config.policy.share_prompts and config.model.attention != "sdpa":
        raise ConfigError(
            f"policy.share_prompts: got true with model.attention={config.model.attention}, expected model.attention=sdpa"
        )
    if config.policy.share_prompts:
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        check_rows_of_several(config.model.path, longest, "policy.share_prompts")
    _check_sides(config, there)
    if machine is None:
        return
    if "critiques" in needs:
        check_engine_fits("judge", config.judge.tensor_parallel_size, cluster.gpus_per_judge, machine)
    _check_machine(config, there, machine, gpus)


def _check_machine(config: Config, there: dict[str, str], machine: Machine, gpus: Sequence[float]) -> None:
    cluster = config.cluster
    check_dtype("model.dtype", config.model.dtype, max(getattr(cluster, key) for key in there.values()), machine)
    check_ranks_fit(cluster.policy_ranks, cluster.gpus_per_policy_rank, machine)
    check_engine_fits("rollout", config.rollout.tensor_parallel_size, cluster.gpus_per_rollout_engine, machine)
    check_room(gpus, machine)
    if cluster.threads is not None and cluster.threads > machine.cores:
        raise ConfigError(
            f"cluster.threads: got {cluster.threads}, expected at most {machine.cores}, the cores of {_node(machine)}, "
            "or null for all"
        )


def _roles(needs: frozenset[str]) -> dict[str, str]:
    """The key of the GPUs of each role that runs the policy's model or one like it, and is there."""
    roles = {"policy": "gpus_per_policy_rank", "rollout": "gpus_per_rollout_engine"}
    if "values" in needs:
        roles["critic"] = "gpus_per_critic_rank"
    if "reference_logprobs" in needs:
        roles["reference"] = "gpus_per_reference_rank"
    return roles


def _check_sides(config: Config, there: dict[str, str]) -> None:
    """A role on the CPU of a run whose policy has a GPU, or the other way round, makes a step many times as long."""
    gpus = {role: getattr(config.cluster, key) for role, key in there.items()}
    policy = gpus["policy"]
    alone = config.cluster.policy_ranks == 1  # ranks that train together cannot share a GPU
    for role in ("critic", "reference"):
        if policy and gpus.get(role) == 0:
            share = "1 or a part of one" if alone or role == "reference" else "1"
            raise ConfigError(
                f"cluster.{there[role]}: got 0 with cluster.gpus_per_policy_rank={policy:g}, expected a GPU for the {role} "
                f"too, {share}: on the CPU it would take most of each step"
            )
    other = next((role for role in gpus if gpus[role]), None)
    if not policy and other is not None:
        share = "1 or a part of one" if alone else "1"
        raise ConfigError(
            f"cluster.gpus_per_policy_rank: got 0 with cluster.{there[other]}={gpus[other]:g}, expected a GPU for the policy "
            f"too, {share}: on the CPU its updates would take most of each step"
        )


def check_dtype(key: str, dtype: str, gpus: float, machine: Machine) -> None:
    """bfloat16 needs a GPU that has it, where `gpus` are asked for."""
    if dtype != "bfloat16" or gpus == 0 or machine.gpu is None or machine.gpu.capability >= BFLOAT16:
        return
    oldest = min(machine.devices or (machine.gpu,), key=lambda gpu: gpu.capability)
    major, minor = oldest.capability
    raise ConfigError(
        f"{key}: got bfloat16 on {oldest.name} of compute capability {major}.{minor}, expected float16 or float32, or "
        "another GPU, of 8.0 or more (CUDA_VISIBLE_DEVICES chooses)"
    )


def check_ranks_fit(ranks: int, gpus: float, machine: Machine) -> None:
    """Ranks that train together have a GPU each."""
    if machine.gpus and gpus >= 1 and ranks > machine.all_gpus:
        where = f"{machine.nodes} nodes" if machine.nodes > 1 else _name(machine)
        raise ConfigError(
            f"cluster.policy_ranks: got {ranks} with cluster.gpus_per_policy_rank={gpus:g}, expected at most "
            f"{machine.all_gpus}, one for each GPU of {where}"
        )


def check_engine_fits(section: str, parallel: int, gpus: float, machine: Machine) -> None:
    """`section` is rollout or judge; an engine's GPUs are on one node."""
    if machine.gpus and gpus > machine.gpus:
        raise ConfigError(
            f"{section}.tensor_parallel_size: got {parallel}, expected at most {machine.gpus}, the GPUs of {_node(machine)}: an engine's "
            "GPUs are on one node"
        )


def check_room(gpus: Sequence[float], machine: Machine) -> None:
    """`gpus` is what each actor asks for."""
    if fit(gpus, machine.gpus, machine.nodes):
        return
    why = ""
    if machine.gpus == 0 and machine.no_gpu is not None:
        why = f" ({machine.no_gpu})"
    elif sum(gpus) <= machine.all_gpus:
        why = " (a part of a GPU is on one GPU, and an actor's GPUs are on one node)"
    raise ConfigError(
        f"cluster: got {sum(gpus):g} GPUs over all actors, expected what fits {_number(machine)}{why}; "
        "lower cluster.gpus_per_*, or join a cluster with cluster.address"
    )


def _number(machine: Machine) -> str:
    if machine.nodes > 1:
        return f"the {machine.all_gpus} of {machine.nodes} nodes"
    return f"the {machine.gpus} of {_name(machine)}"


def _name(machine: Machine) -> str:
    return "this machine" if machine.assumed is None else "the machine"


def _node(machine: Machine) -> str:
    return _name(machine) if machine.nodes == 1 else "a node"


def check_free(config: Config, planned: Sequence[GpuUse]) -> None:
    """ConfigError where other processes have the memory that a run is to have."""
    if not joins(config.cluster):
        check_in_use(this_machine(), firm_bytes(planned))


def check_evaluation_devices(config: Config) -> None:
    """Of these checks those that measuring a checkpoint needs: it has rollout engines and reward workers alone."""
    check_engine(config)
    cluster = config.cluster
    if joins(cluster):
        return
    machine, gpus = this_machine(), cluster.gpus_per_rollout_engine
    check_dtype("model.dtype", config.model.dtype, gpus, machine)
    check_engine_fits("rollout", config.rollout.tensor_parallel_size, gpus, machine)
    rewards = [cluster.gpus_per_reward_worker] * config.reward.workers
    check_room([gpus] * cluster.rollout_engines + rewards, machine)
    check_in_use(machine, engine_bytes(config, machine))


def check_in_use(machine: Machine, planned_bytes_per_gpu: Sequence[int]) -> None:
    """ConfigError where a GPU's memory does not hold what others use and what is planned, in CUDA's order of GPUs."""
    refusal = in_use(machine, planned_bytes_per_gpu)
    if refusal is not None:
        raise ConfigError(refusal)


def in_use(machine: Machine, planned_bytes_per_gpu: Sequence[int]) -> str | None:
    """What `check_in_use` says, or None. Only firm numbers count: use that is not known is none."""
    for index, (gpu, planned) in enumerate(zip(machine.devices, planned_bytes_per_gpu, strict=False)):
        if planned and gpu.used_bytes is not None and gpu.used_bytes + planned > gpu.memory_bytes:
            return (
                f"GPU {index}: got {gpu.used_bytes / GIB:.1f} GiB in use by other processes and {planned / GIB:.1f} GiB "
                f"planned, expected at most {gpu.memory_bytes / GIB:.1f} GiB together: end what runs there (nvidia-smi lists "
                "it), or choose another GPU with CUDA_VISIBLE_DEVICES"
            )
    return None


def engine_bytes(config: Config, machine: Machine) -> list[int]:
    """Bytes of each GPU that the rollout engines take when they start: vLLM refuses a GPU that has less free."""
    engines, gpus = config.cluster.rollout_engines, config.cluster.gpus_per_rollout_engine
    if gpus == 0 or config.rollout.engine != "vllm":
        return []
    together = 1 if gpus >= 1 else min(engines, int(1 / gpus + 1e-9))
    share = rollout_settings(config.rollout, gpus).gpu_memory_utilization
    used = ceil(engines * gpus) if gpus >= 1 else ceil(engines / together)
    return [round(together * share * gpu.memory_bytes) for gpu in machine.devices[:used]]


def fit(shares: Sequence[float], devices: int, nodes: int = 1) -> bool:
    """Whether actors with these shares, parts of one GPU or whole ones, find room on nodes with so many GPUs each. An
    actor's GPUs are on one node.

    >>> fit([1, 0.5, 0.5], 2), fit([0.6, 0.6, 0.6], 2)
    (True, False)
    >>> fit([8, 4, 4], 8, nodes=2), fit([6, 6, 4], 8, nodes=2)
    (True, False)
    """
    left = [float(devices)] * nodes
    for share in sorted((share for share in shares if share >= 1), reverse=True):
        place = next((i for i, free in enumerate(left) if free >= share), None)
        if place is None:
            return False
        left[place] -= share
    parts = [1.0] * int(sum(left))
    for share in sorted((share for share in shares if 0 < share < 1), reverse=True):
        place = next((i for i, free in enumerate(parts) if free >= share - 1e-9), None)
        if place is None:
            return False
        parts[place] -= share
    return True


def check_engine(config: Config) -> None:
    """An engine has what its installation needs, and no more GPUs than it uses."""
    parallel, gpus = config.rollout.tensor_parallel_size, config.cluster.gpus_per_rollout_engine
    check_share("cluster.gpus_per_rollout_engine", gpus)
    check_parallel("rollout", parallel, gpus, "cluster.rollout_engines")
    if config.rollout.engine == "vllm" and config.cluster.gpus_per_rollout_engine == 0 and vllm_needs_gpu():
        raise ConfigError(
            "cluster.gpus_per_rollout_engine: got 0 with a vLLM that was built for CUDA, expected 1 (and "
            "cluster.gpus_per_policy_rank=1), or 0.5 for both with rollout.gpu_memory_utilization=0.4, or an installation "
            "with REQUIREMENTS=cpu"
        )


def check_offload(role: str, offload: bool, gpus: float) -> None:
    if offload and gpus == 0:
        raise ConfigError(
            f"{role}.offload_optimizer: got true with cluster.gpus_per_{role}_rank=0, expected false: "
            "without a GPU the optimiser is in main memory already"
        )


def check_share(key: str, gpus: float, ranks: int = 1) -> None:
    """GPUs of one actor. Ray gives parts of one GPU or whole ones; NCCL wants another device for each of `ranks`."""
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"{key}: got {gpus:g}, expected a part of one GPU or a whole number")
    if ranks > 1 and 0 < gpus < 1:
        raise ConfigError(
            f"{key}: got {gpus:g} with cluster.policy_ranks={ranks}, expected 1: ranks that train together cannot share "
            "a GPU"
        )


def check_ranks(key: str, gpus: float, ranks: int) -> None:
    """GPUs of each of the ranks that train together: one, or a part of one for a single rank."""
    check_share(key, gpus, ranks)
    _check_one_gpu(key, gpus, ranks, "cluster.policy_ranks")


def _check_one_gpu(key: str, gpus: float, ranks: int, more: str) -> None:
    if gpus > 1:
        raise ConfigError(
            f"{key}: got {gpus:g}, expected 1: a rank uses one GPU; for more GPUs set {more}={ranks * gpus:g}"
        )


def check_parallel(section: str, parallel: int, gpus: float, more: str) -> None:
    """An engine uses a GPU for each part of its model. `section` is rollout or judge, `more` is what adds engines."""
    if gpus <= parallel:
        return
    key = "cluster.gpus_per_rollout_engine" if section == "rollout" else "cluster.gpus_per_judge"
    raise ConfigError(
        f"{key}: got {gpus:g} with {section}.tensor_parallel_size={parallel}, expected {parallel}: an engine uses a GPU for "
        f"each part of its model; for more GPUs raise {more} or {section}.tensor_parallel_size"
    )


def check_heads(section: str, parallel: int, model: ModelFacts | None) -> None:
    """vLLM gives each part of a model as many heads; of fewer key-value heads than parts, some have copies. `model` is None
    where its size is not known."""
    if model is None or parallel == 1:
        return
    heads, keys = model.shapes["q_proj"][1] // model.head_dim, model.key_value_heads
    sizes = [n for n in range(1, heads + 1) if heads % n == 0 and (keys % n == 0 or n % keys == 0)]
    if parallel not in sizes:
        raise ConfigError(
            f"{section}.tensor_parallel_size: got {parallel}, expected {' or '.join(map(str, sizes))}: the model's {heads} "
            f"attention heads and {keys} key-value heads are dealt out evenly"
        )


def check_attention(attention: str, key: str, gpus: float) -> None:
    """`key` is what gives these GPUs to the actor that loads the model."""
    if attention != "flash_attention_2":
        return
    if gpus == 0:
        raise ConfigError(f"model.attention: got flash_attention_2 with {key}=0, expected sdpa or eager, or a GPU")
    if find_spec("flash_attn") is None and find_spec("kernels") is None:
        raise ConfigError(
            "model.attention: got flash_attention_2, and neither the package flash-attn nor kernels is installed, expected "
            "sdpa (on GPUs torch's own flash kernels) or one of them"
        )


def vllm_needs_gpu() -> bool:
    """Whether the vLLM that is installed here was built for GPUs; those for CPUs are a package, or a version, of their own."""
    try:
        return "cpu" not in version("vllm")
    except PackageNotFoundError:
        return False


def _check_broadcast(policy: float, rollout: float) -> None:
    """NCCL joins devices, each with one member; gloo joins processes without any."""
    if (policy == 0) != (rollout == 0) or 0 < policy < 1 or 0 < rollout < 1:
        raise ConfigError(
            f"cluster.weight_transfer: got broadcast with gpus_per_policy_rank={policy:g} and gpus_per_rollout_engine="
            f"{rollout:g}, expected whole GPUs for both or none for both; otherwise take object_store"
        )
