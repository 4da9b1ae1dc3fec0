"""Refuse a preference stage whose ranks do not fit their GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apportion.actors.engine_settings import EngineSettings
from apportion.conf import gpu_memory
from apportion.conf.defaults import engine_settings
from apportion.conf.devices import Machine, check_ranks
from apportion.conf.gpu_fit import Facts, Fit, Option, training_options
from apportion.conf.models import ModelFacts, check_targets, read_model
from apportion.conf.placement import GpuUse, Tenant
from apportion.platform.errors import ConfigError

if TYPE_CHECKING:
    from apportion.conf.preference_schema import PreferenceConfig


def check_gpu_memory(config: PreferenceConfig, machine: Machine) -> list[GpuUse]:
    """What each GPU holds; ConfigError where that is more than it has. `machine` is the one that ranks start on."""
    if config.cluster.gpus_per_policy_rank == 0:
        return []
    facts: dict[str, ModelFacts | None] = {"policy": read_model(config.model.path)}
    dpo = getattr(config, "dpo", None)  # of that stage alone
    reference = None if dpo is None else dpo.reference
    if reference is not None:
        facts["reference"] = read_model(reference, "dpo.reference")
    longest = (2 if config.pairs else 1) * config.data.max_tokens
    return Fit(machine, _ranks, longest, _options, lambda c, f: _accepts(c, f, machine)).check(config, facts)


def _ranks(config: PreferenceConfig, facts: Facts) -> list[Tenant]:
    c, model, dtype = config.cluster, facts["policy"], config.model.dtype
    if model is None:
        memory = {"context": gpu_memory.CONTEXT}
        return [Tenant(config.stage, c.policy_ranks, c.gpus_per_policy_rank, memory, known=False)]
    weights, settings = _weights(config, model), _settings(config, model)
    memory = gpu_memory.training(weights, settings, c.policy_ranks, dtype)
    start = gpu_memory.start_bytes(weights, settings, dtype)
    reference = facts.get("reference")
    if reference is not None:  # read before the first step, which makes the moments; then freed
        tokens = 2 * settings.micro_batch_tokens
        beside = gpu_memory.frozen(reference, tokens, settings.logits_chunk_tokens, dtype)
        start = max(start, memory["weights"] + memory.get("masters", 0) + sum(beside.values()))
    return [Tenant(config.stage, c.policy_ranks, c.gpus_per_policy_rank, memory, start)]


def _weights(config: PreferenceConfig, model: ModelFacts) -> gpu_memory.Weights:
    lora = config.policy.lora
    scores = config.stage == "reward_model"
    return gpu_memory.score_weights(model, lora) if scores else gpu_memory.policy_weights(model, lora)


def _settings(config: PreferenceConfig, model: ModelFacts | None) -> EngineSettings:
    return engine_settings(config.policy, config.cluster.gpus_per_policy_rank, model)


def _accepts(config: PreferenceConfig, facts: Facts, machine: Machine) -> bool:
    """Whether main memory holds what is offloaded, each rank has a GPU and an example, and adapters find their layers."""
    model, ranks = facts["policy"], config.cluster.policy_ranks
    lora = config.policy.lora
    try:
        check_ranks("cluster.gpus_per_policy_rank", config.cluster.gpus_per_policy_rank, ranks)
        if lora is not None:
            check_targets(lora.targets, config.model.path)
    except ConfigError:
        return False
    if ranks > config.train.batch_size:
        return False
    if model is None:
        return True
    held = gpu_memory.offloaded(_weights(config, model), _settings(config, model), ranks, config.model.dtype)
    return ranks * sum(held.values()) <= machine.memory_bytes * machine.nodes


def _options(config: PreferenceConfig, over: list[GpuUse]) -> list[Option]:
    return training_options(config, "policy", _settings(config, read_model(config.model.path)))
