"""What every process is told of the machine it runs on."""

from __future__ import annotations

import os

from apportion.conf.schema import Config


def joins(config: Config) -> bool:
    return config.cluster.address is not None or bool(os.environ.get("RAY_ADDRESS"))


def thread_count(config: Config) -> int:
    return config.cluster.threads or os.cpu_count() or 1


def threads_environment(config: Config) -> dict[str, str]:
    # Ray would set it to num_cpus; compute actors take turns on all cores.
    return {"OMP_NUM_THREADS": str(thread_count(config)), "TOKENIZERS_PARALLELISM": "false"}


def training_environment(config: Config, gpus: float) -> dict[str, str]:
    environment = threads_environment(config)
    if gpus == 0:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment
