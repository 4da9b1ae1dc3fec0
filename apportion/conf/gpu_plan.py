"""Plan the memory of each GPU of a run, and refuse what does not fit with what would."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, floor

from apportion.conf import gpu_memory
from apportion.conf.combinations import longest_sampled
from apportion.conf.defaults import engine_settings, judge_utilization, policy_settings, rollout_settings
from apportion.conf.devices import Machine
from apportion.conf.gpu_fit import Facts, Fit, Option, training_options
from apportion.conf.gpu_memory import CONTEXT, VllmShare
from apportion.conf.judges import own_model
from apportion.conf.memory import training_memory
from apportion.conf.models import ModelFacts, read_model
from apportion.conf.placement import GpuUse, Tenant, size
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError

LEAST_UTILIZATION, MOST_UTILIZATION = 0.05, 0.98  # that the configuration accepts


@dataclass(frozen=True)
class GpuPlan:
    uses: list[GpuUse] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_gpus(
    config: Config,
    needs: frozenset[str],
    model: ModelFacts | None,
    teachers: Facts,
    machine: Machine | None,
) -> GpuPlan:
    """ConfigError where a GPU cannot hold what shares it. `machine` is None where nothing is known of it."""
    facts = _facts(config, needs, model) | dict(teachers)
    gpu_bytes = None if machine is None or machine.gpu is None else machine.gpu.memory_bytes
    fit = Fit(
        machine,
        lambda c, f: tenants(c, f, gpu_bytes),
        config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        lambda c, use: _options(c, facts, use),
        lambda c, f: _accepts(c, f, machine),
    )
    uses, notes = fit.check(config, facts), []
    for share in vllm_shares(config, facts) if gpu_bytes is not None else []:
        held = share.held(gpu_bytes)
        if held < 1:
            raise ConfigError(_no_cache(share, gpu_bytes))
        if share.section == "rollout" and held < share.sequences:
            notes.append(
                f"the KV cache holds {held} longest sequences of rollout.max_sequences={share.sequences}; more "
                "rollout.gpu_memory_utilization may decode faster"
            )
    return GpuPlan(uses, notes)


def _accepts(config: Config, facts: Facts, machine: Machine | None) -> bool:
    """Whether caches hold a sequence, and main memory what is offloaded."""
    if machine is None or machine.gpu is None:
        return True
    gpu_bytes, ranks = machine.gpu.memory_bytes, config.cluster.policy_ranks
    offloaded = training_memory(config, policy_settings(config, facts["policy"]), facts["policy"])
    fits = ranks * sum(offloaded.values()) <= machine.memory_bytes * machine.nodes
    return fits and all(share.held(gpu_bytes) >= 1 for share in vllm_shares(config, facts))


def _no_cache(share: VllmShare, gpu_bytes: int) -> str:
    least, at = share.least_utilization(gpu_bytes), share.section
    got = (
        f"{at}.gpu_memory_utilization: got {share.utilization:g}, {size(round(share.utilization * gpu_bytes))} of a GPU with "
        f"{size(gpu_bytes)}, which has no room for weights and working memory of {size(share.taken)} and the cache of one "
        f"sequence of {share.longest} tokens, {size(share.sequence_bytes)}"
    )
    if least <= MOST_UTILIZATION:
        return f"{got}; expected at least {least:g}"
    return (
        f"{got}; no share is enough: expected a larger {at}.tensor_parallel_size, shorter sequences or a smaller model"
    )


def _facts(config: Config, needs: frozenset[str], model: ModelFacts | None) -> dict[str, ModelFacts | None]:
    facts = {"policy": model, "rollout": model}
    for role, signal, section in (
        ("critic", "values", config.critic),
        ("reference", "reference_logprobs", config.reference),
    ):
        if signal in needs:
            facts[role] = model if section.model is None else read_model(section.model, f"{role}.model")
    judge = own_model(config.judge) if "critiques" in needs else None
    if judge is not None:
        facts["judge"] = read_model(judge, "judge.model")
    return facts


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
    found.append(Tenant("reward", config.reward.workers, c.gpus_per_reward_worker, {"context": CONTEXT}))
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
            beside = gpu_memory.frozen(own, 0, settings.logits_chunk_tokens, dtype)
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
            model, config.model.dtype, _rows(config), config.data.max_prompt_tokens, response
        )
    return Tenant(role, count, gpus, memory)


def _rows(config: Config) -> int:
    """Decoded side by side in one engine."""
    most = rollout_settings(config.rollout, config.cluster.gpus_per_rollout_engine).max_sequences
    prompts = ceil(config.train.prompts_per_step / config.cluster.rollout_engines)
    return most if config.data.eval is not None else min(most, prompts * config.rollout.responses_per_prompt)


def _utilization(config: Config, role: str) -> float:
    if role == "judge":
        return judge_utilization(config.judge, config.cluster.gpus_per_judge)
    return rollout_settings(config.rollout, config.cluster.gpus_per_rollout_engine).gpu_memory_utilization


def _options(config: Config, facts: Facts, use: GpuUse) -> list[Option]:
    """What may lower what this GPU holds."""
    roles, c, options = {tenant.role for tenant in use.tenants}, config.cluster, []
    for role, section, gpus in (
        ("policy", config.policy, c.gpus_per_policy_rank),
        ("critic", config.critic, c.gpus_per_critic_rank),
    ):
        if role in roles:
            options += training_options(config, role, engine_settings(section, gpus, facts[role]))
    if config.algorithm.distillation is not None:  # its own checks refuse both
        options = [o for o in options if o.text != "policy.zero_stage=3" and "policy.lora" not in o.changes]
    if "rollout" in roles and config.rollout.engine == "vllm":
        options += _less_for_engines(config, use)
    if "rollout" in roles and config.rollout.engine == "transformers":
        rows = _rows(config)
        fewer = [rows // 2**halvings for halvings in range(1, 8) if rows // 2**halvings >= 1]
        options += [Option(f"rollout.max_sequences={n}", {"rollout.max_sequences": n}) for n in fewer]
    return options


def _less_for_engines(config: Config, use: GpuUse) -> list[Option]:
    """The largest share for the rollout engines on this GPU that leaves room for the others."""
    assert use.gpu is not None
    engines = [tenant for tenant in use.tenants if tenant.role == "rollout"]
    others = use.bytes - sum(tenant.bytes for tenant in engines)
    share = (
        floor((use.gpu.memory_bytes - others - CONTEXT * len(engines)) / len(engines) / use.gpu.memory_bytes * 100)
        / 100
    )
    if not LEAST_UTILIZATION <= share < _utilization(config, "rollout"):
        return []
    return [Option(f"rollout.gpu_memory_utilization={share:g}", {"rollout.gpu_memory_utilization": share})]


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
