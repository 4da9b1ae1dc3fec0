"""What each actor that has a GPU holds there, from a run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path

from apportion.actors.reward_sources import parse_entries
from apportion.conf import gpu_memory
from apportion.conf.combinations import longest_sampled
from apportion.conf.defaults import engine_settings, judge_utilization, policy_settings, rollout_settings
from apportion.conf.gpu_memory import CONTEXT, VllmShare
from apportion.conf.models import VALUE_BYTES, ModelFacts, read_model
from apportion.conf.placement import Tenant
from apportion.conf.schema import Config

Facts = Mapping[str, ModelFacts | None]  # of the model of each role that the run has, and of teachers by their keys


def tenants(config: Config, facts: Facts, gpu_bytes: int | None) -> list[Tenant]:
    """Every actor that has a GPU. `gpu_bytes` is None where its memory is not known."""
    c = config.cluster
    found = [
        _policy(config, facts),
        _engine(config, facts, "rollout", c.rollout_engines, c.gpus_per_rollout_engine, gpu_bytes),
    ]
    if "critic" in facts:
        found.append(_critic(config, facts["critic"]))
    if "reference" in facts:
        own, chunk = facts["reference"], policy_settings(config, None).logits_chunk_tokens
        memory = {"context": CONTEXT}
        if own is not None:
            memory = gpu_memory.frozen(own, config.reference.micro_batch_tokens, chunk, config.model.dtype)
        found.append(Tenant("reference", c.reference_ranks, c.gpus_per_reference_rank, memory, known=own is not None))
    if "judge" in facts:
        found.append(_engine(config, facts, "judge", config.judge.workers, c.gpus_per_judge, gpu_bytes))
    found.append(_reward(config))
    return [tenant for tenant in found if tenant.gpus > 0]


def _policy(config: Config, facts: Facts) -> Tenant:
    c, model, dtype = config.cluster, facts["policy"], config.model.dtype
    settings = policy_settings(config, model)
    if model is None:
        return Tenant("policy", c.policy_ranks, c.gpus_per_policy_rank, {"context": CONTEXT}, known=False)
    weights = gpu_memory.policy_weights(model, config.policy.lora, config.algorithm.entropy_coefficient > 0)
    memory = gpu_memory.training(weights, settings, c.policy_ranks, dtype)
    for name, own in facts.items():
        if name.startswith("teachers.") and own is not None:
            beside = gpu_memory.frozen(own, settings.micro_batch_tokens, settings.logits_chunk_tokens, dtype)
            memory["teachers"] = memory.get("teachers", 0) + beside["weights"]
            memory["logits"] += beside["logits"]
    start = gpu_memory.start_bytes(weights, settings, dtype)
    return Tenant("policy", c.policy_ranks, c.gpus_per_policy_rank, memory, start)


def _critic(config: Config, model: ModelFacts | None) -> Tenant:
    c, dtype = config.cluster, config.model.dtype
    if model is None:
        return Tenant("critic", c.policy_ranks, c.gpus_per_critic_rank, {"context": CONTEXT}, known=False)
    settings, weights = engine_settings(config.critic, c.gpus_per_critic_rank, model), gpu_memory.critic_weights(model)
    memory = gpu_memory.training(weights, settings, c.policy_ranks, dtype)
    start = gpu_memory.start_bytes(weights, settings, dtype)
    return Tenant("critic", c.policy_ranks, c.gpus_per_critic_rank, memory, start)


def _reward(config: Config) -> Tenant:
    """Reward models are counted where they are on this machine; what a function takes is not known."""
    workers, gpus = config.reward.workers, config.cluster.gpus_per_reward_worker
    entries = parse_entries(config.reward.functions, config.reward.timeout_seconds) if gpus else []
    weights, known = 0, 0
    for entry in entries:
        kind, _, path = str(entry.function).partition(":")
        is_folder = Path(path).expanduser().is_dir()  # or one that a stage of `before` makes, which is not here yet
        model = None
        if kind == "model" and (is_folder or not path.startswith(("/", ".", "~"))):
            model = read_model(path, "reward.functions")
        if model is not None:
            weights += model.parameters * VALUE_BYTES.get(entry.params.get("dtype", "float32"), 4)
            known += 1
    return Tenant("reward", workers, gpus, {"weights": weights, "context": CONTEXT}, known=known == len(entries))


def _engine(config: Config, facts: Facts, role: str, count: int, gpus: float, gpu_bytes: int | None) -> Tenant:
    model = facts[role]
    share = next((s for s in vllm_shares(config, facts) if s.section == role), None)
    if share is not None:
        return Tenant(role, count, gpus, share.memory(gpu_bytes))
    section = config.rollout if role == "rollout" else config.judge
    memory = {"context": CONTEXT}
    if model is None:
        if section.engine == "vllm" and gpus and gpu_bytes is not None:
            memory = {"share": round(_utilization(config, role) * gpu_bytes)} | memory
        return Tenant(role, count, gpus, memory, known=False)
    if role == "judge":
        judge = config.judge
        prompt = judge.context_tokens - judge.max_tokens
        memory = gpu_memory.transformers_engine(model, judge.dtype, judge.concurrency, prompt, judge.max_tokens)
    else:
        response = longest_sampled(config) - config.data.max_prompt_tokens
        memory = gpu_memory.transformers_engine(
            model, config.model.dtype, rows_side_by_side(config), config.data.max_prompt_tokens, response
        )
    return Tenant(role, count, gpus, memory)


def vllm_shares(config: Config, facts: Facts) -> list[VllmShare]:
    """Engines of vLLM on GPUs whose model is known."""
    shares = []
    r, gpus = config.rollout, config.cluster.gpus_per_rollout_engine
    model = facts["rollout"]
    if model is not None and gpus and r.engine == "vllm":
        share, settled = _utilization(config, "rollout"), rollout_settings(r, gpus)
        sizes = (longest_sampled(config), settled.max_sequences)
        held = VllmShare("rollout", model, config.model.dtype, r.tensor_parallel_size, share, settled.compile, *sizes)
        shares.append(held)
    judge, model = config.judge, facts.get("judge")
    if model is not None and config.cluster.gpus_per_judge and judge.engine == "vllm":
        share, sizes = _utilization(config, "judge"), (judge.context_tokens, judge.concurrency)
        shares.append(VllmShare("judge", model, judge.dtype, judge.tensor_parallel_size, share, True, *sizes))
    return shares


def rows_side_by_side(config: Config) -> int:
    """Decoded side by side in one engine."""
    most = rollout_settings(config.rollout, config.cluster.gpus_per_rollout_engine).max_sequences
    prompts = ceil(config.train.prompts_per_step / config.cluster.rollout_engines)
    return most if config.data.eval is not None else min(most, prompts * config.rollout.responses_per_prompt)


def _utilization(config: Config, role: str) -> float:
    if role == "judge":
        return judge_utilization(config.judge, config.cluster.gpus_per_judge)
    return rollout_settings(config.rollout, config.cluster.gpus_per_rollout_engine).gpu_memory_utilization
