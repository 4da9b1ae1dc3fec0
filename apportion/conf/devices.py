"""Refuses a distribution over GPUs that cannot run. Each check says got, expected and what to change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from apportion.conf.models import check_rows_of_several
from apportion.conf.schema import Config
from apportion.platform.cuda import Gpu
from apportion.platform.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """What a run would have for itself: `nodes` alike, for an embedded Ray this one."""

    cores: int  # of a node
    memory_bytes: int
    gpus: int
    gpu: Gpu | None = None  # the least of them; None: nothing is known of them but their number
    nodes: int = 1


def this_machine() -> Machine:
    """Cores this process may use, memory that its container may use, GPUs that are visible."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            memory = min(memory, int(text))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [d for d in visible.split(",") if d.strip() not in ("", "-1")] if visible is not None else None
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    gpus = present if devices is None else min(present, len(devices))
    return Machine(len(os.sched_getaffinity(0)), memory, gpus)


def check_devices(config: Config, needs: frozenset[str], machine: Machine | None, gpus: Sequence[float]) -> None:
    """`machine` is None where the cluster is not this machine; `gpus` is what each actor asks for."""
    cluster = config.cluster
    for role, count in (("policy", cluster.gpus_per_policy_rank), ("critic", cluster.gpus_per_critic_rank)):
        settings = config.policy if role == "policy" else config.critic
        if settings.offload_optimizer and count == 0:
            raise ConfigError(
                f"{role}.offload_optimizer: got true with cluster.gpus_per_{role}_rank=0, expected false: "
                "without a GPU the optimiser is in main memory already"
            )
        check_share(f"cluster.gpus_per_{role}_rank", count, cluster.policy_ranks)
    for role in ("rollout_engine", "reference_rank", "judge", "reward_worker"):
        check_share(f"cluster.gpus_per_{role}", getattr(cluster, f"gpus_per_{role}"))
    for role, there in (("policy", True), ("critic", "values" in needs), ("reference", "reference_logprobs" in needs)):
        key = f"gpus_per_{role}_rank"
        if there:
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
    if machine is None:
        return
    if not fit(gpus, machine.gpus):
        raise ConfigError(
            f"cluster: got {sum(gpus):g} GPUs over all actors, expected what fits the {machine.gpus} of this machine; "
            "lower cluster.gpus_per_*, or join a cluster with cluster.address"
        )
    if cluster.threads is not None and cluster.threads > machine.cores:
        raise ConfigError(
            f"cluster.threads: got {cluster.threads}, expected at most {machine.cores}, the cores of this machine, "
            "or null for all"
        )


def fit(shares: Sequence[float], devices: int) -> bool:
    """Whether actors with these shares, parts of one GPU or whole ones, find room on so many.

    >>> fit([1, 0.5, 0.5], 2), fit([0.6, 0.6, 0.6], 2)
    (True, False)
    """
    whole = int(sum(share for share in shares if share >= 1))
    free = [1.0] * (devices - whole)
    for share in sorted((share for share in shares if 0 < share < 1), reverse=True):
        place = next((i for i, left in enumerate(free) if left >= share - 1e-9), None)
        if place is None:
            return False
        free[place] -= share
    return whole <= devices


def check_engine(config: Config) -> None:
    if config.rollout.engine == "vllm" and config.cluster.gpus_per_rollout_engine == 0 and vllm_needs_gpu():
        raise ConfigError(
            "cluster.gpus_per_rollout_engine: got 0 with a vLLM that was built for CUDA, expected 1 (and "
            "cluster.gpus_per_policy_rank=1), or 0.5 for both with rollout.gpu_memory_utilization=0.4, or an installation "
            "with REQUIREMENTS=cpu"
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
