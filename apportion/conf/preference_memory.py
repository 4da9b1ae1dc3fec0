"""Refuse a preference stage whose ranks do not fit their GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apportion.conf import gpu_memory
from apportion.conf.defaults import engine_settings
from apportion.conf.devices import Machine
from apportion.conf.gpu_fit import Facts, Fit, training_options
from apportion.conf.models import read_model
from apportion.conf.placement import GpuUse, Tenant

if TYPE_CHECKING:
    from apportion.conf.preference_schema import PreferenceConfig


def check_gpu_memory(config: PreferenceConfig, machine: Machine) -> list[GpuUse]:
    """What each GPU holds; ConfigError where that is more than it has. `machine` is the one that ranks start on."""
    facts: dict[str, Any] = {"policy": read_model(config.model.path)}
    reference = config.dpo.reference if hasattr(config, "dpo") else None
    if reference is not None:
        facts["reference"] = read_model(reference, "dpo.reference")
    if config.cluster.gpus_per_policy_rank == 0:
        return []
    return Fit(machine, _ranks, (2 if config.pairs else 1) * config.data.max_tokens, _options).check(config, facts)


def _ranks(config: PreferenceConfig, facts: Facts) -> list[Tenant]:
    c, model, dtype, lora = config.cluster, facts["policy"], config.model.dtype, config.policy.lora
    if model is None:
        memory = {"context": gpu_memory.CONTEXT}
        return [Tenant(config.stage, c.policy_ranks, c.gpus_per_policy_rank, memory, known=False)]
    scores = config.stage == "reward_model"
    weights = gpu_memory.score_weights(model, lora) if scores else gpu_memory.policy_weights(model, lora)
    settings = engine_settings(config.policy, c.gpus_per_policy_rank, model)
    memory = gpu_memory.training(weights, settings, c.policy_ranks, dtype)
    start = gpu_memory.start_bytes(weights, settings, dtype)
    reference = facts.get("reference")
    if reference is not None:  # read before the first step, which makes the moments; then freed
        beside = gpu_memory.frozen(reference, 0, settings.logits_chunk_tokens, dtype)
        start = max(start, memory["weights"] + memory.get("masters", 0) + sum(beside.values()))
    return [Tenant(config.stage, c.policy_ranks, c.gpus_per_policy_rank, memory, start)]


def _options(config: PreferenceConfig, use: GpuUse) -> list[Any]:
    settings = engine_settings(config.policy, config.cluster.gpus_per_policy_rank, read_model(config.model.path))
    return training_options(config, "policy", settings)
