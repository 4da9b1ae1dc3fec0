"""What every process is told of the machine it runs on."""

from __future__ import annotations

import os

from apportion.conf import machine
from apportion.conf.preference_schema import PreferenceConfig, RanksConfig
from apportion.conf.schema import ClusterConfig, Config
from apportion.platform import room

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads the first that is set


def joins(config: Config | PreferenceConfig) -> bool:
    return machine.joins(config.cluster)


def thread_count(cluster: ClusterConfig | RanksConfig, gpus: float = 0.0) -> int:
    """Threads of a compute actor with so many GPUs: its share of its node's cores, all of them without a GPU. On a cluster
    it may get any node, so the smallest counts."""
    if cluster.threads is not None:
        return cluster.threads
    if machine.joins(cluster) and (node := room.smallest(room.alive_nodes(), gpus)) is not None:
        return machine.threads_of(gpus, int(node.cores), node.gpus)
    here = machine.this_machine()
    return machine.threads_of(gpus, here.cores, here.gpus)


def cores_environment(threads: int) -> dict[str, str]:
    """For compute actors; Ray would set their threads to num_cpus. Passive: threads that
    wait for each other sleep. By default they spin, and two actors at work at once (policy and critic), or anything else
    on the machine, then make a step several times as long."""
    policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy, "TOKENIZERS_PARALLELISM": "false"}


def device_environment(gpus: float) -> dict[str, str]:
    """Ray shows an actor that asked for no GPU all of its node's, which it has given to others."""
    return {} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def compute_environment(config: Config, gpus: float) -> dict[str, str]:
    return cores_environment(thread_count(config.cluster, gpus)) | device_environment(gpus)


def training_environment(gpus: float, deterministic: bool) -> dict[str, str]:
    """What torch needs on the GPUs of ranks that train or score. A variable that the user has set keeps its value.

    Not for vLLM: it holds its cache in one block, and what it registers with NCCL or other processes may not be remapped.
    """
    if gpus == 0:
        return {}
    environment = {}
    if not any(name in os.environ for name in _ALLOCATOR):
        # Rows of changing width would leave gaps that no later row fits into.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if deterministic and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else torch calls its matrix products not deterministic
    return environment


def engine_environment(config: Config, gpus: float, alone: bool) -> dict[str, str]:
    """For what samples: a token is hundreds of short parallel parts, and threads that sleep between them cost a fifth to a
    third of the speed. So these look out for the next part before they sleep: some microseconds, or, `alone` at work on its
    cores, a millisecond (what GNU OpenMP does by itself). A setting of the user's own stands."""
    environment = compute_environment(config, gpus)
    if "OMP_WAIT_POLICY" in os.environ:
        return environment
    return environment | {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "300000" if alone else "1000")}
