"""The memory that `apportion plan` expects of a training rank. The only place here that knows how to ask for it."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.models import COMMON, SHAPES


def training_bytes(shape: str, micro_batch_tokens: int, chunk: int, checkpointing: bool) -> dict[str, int]:
    """Bytes by purpose of a policy rank alone on one GPU, in bf16 with ZeRO 2."""
    from apportion.conf.defaults import policy_settings
    from apportion.conf.gpu_memory import policy_weights, training
    from apportion.conf.models import _facts
    from apportion.conf.schema import ClusterConfig, Config
    from apportion.conf.schema_models import ModelConfig, PolicyConfig

    policy = PolicyConfig(
        micro_batch_tokens=micro_batch_tokens, logits_chunk_tokens=chunk, gradient_checkpointing=checkpointing
    )
    config = Config(model=ModelConfig(path=shape), policy=policy, cluster=ClusterConfig(gpus_per_policy_rank=1))
    description: dict[str, Any] = COMMON | SHAPES[shape]
    facts = _facts(description, None)  # there is no folder: nothing is saved to be measured
    return training(policy_weights(facts, None), policy_settings(config, facts), 1, config.model.dtype)
