"""Estimate the main memory that a model takes in an actor: weights, optimizer and caches as they are by design, activations
and logits roughly. Every function gives bytes by what they are for. What is on a GPU is in `gpu_memory`."""

from __future__ import annotations

from apportion.actors.engine_settings import EngineSettings
from apportion.conf.combinations import longest_sampled
from apportion.conf.defaults import policy_settings, rollout_settings
from apportion.conf.gpu_memory import GIB, critic_weights, offloaded, policy_weights
from apportion.conf.models import VALUE_BYTES, ModelFacts
from apportion.conf.schema import Config

MASTER_BYTES, ADAM_BYTES = 4, 8  # a float32 copy; two float32 moments


def training_memory(
    config: Config, settings: EngineSettings, model: ModelFacts | None, role: str = "policy"
) -> dict[str, int]:
    """Bytes of one training rank under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): stage 1 parts masters and
    moments among the ranks, stage 2 gradients too, stage 3 weights too. Only adapters are trained under LoRA."""
    if model is None:
        return {}
    cluster = config.cluster
    if (cluster.gpus_per_policy_rank if role == "policy" else cluster.gpus_per_critic_rank) > 0:
        weights = policy_weights(model, config.policy.lora) if role == "policy" else critic_weights(model)
        return offloaded(weights, settings, cluster.policy_ranks, config.model.dtype)
    ranks, stage = config.cluster.policy_ranks, settings.zero_stage
    value = VALUE_BYTES[config.model.dtype]
    trained = model.parameters
    lora = config.policy.lora if role == "policy" else None
    if lora is not None:
        trained = model.lora_parameters(lora.rank, lora.targets)
    optimizer_share = ranks if stage >= 1 else 1
    gradient_share = ranks if stage >= 2 else 1
    frozen = model.parameters if lora is not None else 0
    memory = {"weights": (trained + frozen) * value // (ranks if stage == 3 else 1)}
    if value == 2:
        memory["masters"] = trained * MASTER_BYTES // optimizer_share
    memory["adam"] = trained * ADAM_BYTES // optimizer_share
    # Stage 0 accumulates in the weights' type and copies to float32 for the step; the others accumulate in float32.
    memory["gradients"] = trained * (value + 4 if stage == 0 and value == 2 else 4) // gradient_share
    kept = 2 if settings.gradient_checkpointing else 24  # values a layer keeps for each token and hidden unit
    memory["activations"] = settings.micro_batch_tokens * model.hidden * model.layers * kept * value
    if role == "policy":
        memory["logits"] = logits_bytes(settings.logits_chunk_tokens, model, 3)
    return memory


def teacher_memory(config: Config, teachers: dict[str, ModelFacts | None]) -> dict[str, int]:
    """Frozen weights beside each policy rank, and their logits of one chunk."""
    known = [facts for facts in teachers.values() if facts is not None]
    if not known or config.cluster.gpus_per_policy_rank > 0:
        return {}
    chunk = policy_settings(config, None).logits_chunk_tokens
    return {
        "teachers": sum(facts.parameters for facts in known) * VALUE_BYTES[config.model.dtype],
        "teachers' logits": sum(logits_bytes(chunk, facts, 2) for facts in known),
    }


def frozen_memory(config: Config, model: ModelFacts | None) -> dict[str, int]:
    """Of the reference."""
    if model is None or config.cluster.gpus_per_reference_rank > 0:
        return {}
    chunk = policy_settings(config, None).logits_chunk_tokens
    return {
        "weights": model.parameters * VALUE_BYTES[config.model.dtype],
        "logits": logits_bytes(chunk, model, 2),
    }


def rollout_memory(config: Config, model: ModelFacts | None) -> dict[str, int]:
    if model is None or config.cluster.gpus_per_rollout_engine > 0:
        return {}
    value, rollout = VALUE_BYTES[config.model.dtype], config.rollout
    longest = longest_sampled(config)
    side_by_side = rollout_settings(rollout, config.cluster.gpus_per_rollout_engine).max_sequences
    memory = {"weights": model.parameters * value // rollout.tensor_parallel_size}
    if rollout.engine == "vllm":
        memory["kv cache"] = max(1, round(rollout.kv_cache_gib)) * GIB
    else:
        memory["kv cache"] = side_by_side * longest * model.kv_bytes_per_token(value) // rollout.tensor_parallel_size
    return memory


def logits_bytes(tokens: int, model: ModelFacts, copies: int) -> int:
    return tokens * model.vocabulary * 4 * copies
