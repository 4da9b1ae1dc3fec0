"""Plan the memory of each GPU of a run, and refuse what does not fit with what would."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor

from apportion.conf.combinations import check_combinations
from apportion.conf.defaults import engine_settings, utilization
from apportion.conf.devices import Machine
from apportion.conf.gpu_fit import Fit, Option, training_options
from apportion.conf.gpu_memory import CONTEXT, VllmShare
from apportion.conf.gpu_tenants import Facts, rows_side_by_side, tenants, vllm_shares
from apportion.conf.judges import own_model
from apportion.conf.memory import training_memory
from apportion.conf.models import ModelFacts, read_model
from apportion.conf.placement import GpuUse, size
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError

_GPUS_OF = {
    "policy": "gpus_per_policy_rank",
    "rollout": "gpus_per_rollout_engine",
    "critic": "gpus_per_critic_rank",
    "reference": "gpus_per_reference_rank",
    "judge": "gpus_per_judge",
    "reward": "gpus_per_reward_worker",
}
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
        lambda c, over: _options(c, facts, over),
        lambda c, f: _accepts(c, f, machine) and _combine(c, needs, f, machine),
    )
    uses = fit.check(config, facts)
    return GpuPlan(uses, [] if gpu_bytes is None else _check_caches(vllm_shares(config, facts), gpu_bytes))


def _check_caches(shares: list[VllmShare], gpu_bytes: int) -> list[str]:
    """Notes on caches that hold fewer sequences than are decoded; ConfigError for one that does not hold any."""
    notes = []
    for share in shares:
        held = share.held(gpu_bytes)
        if held < 1:
            raise ConfigError(_no_cache(share, gpu_bytes))
        if share.section == "rollout" and held < share.sequences:
            notes.append(
                f"the KV cache holds {held} longest sequences of rollout.max_sequences={share.sequences}; more "
                "rollout.gpu_memory_utilization may decode faster"
            )
    return notes


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


def _accepts(config: Config, facts: Facts, machine: Machine | None) -> bool:
    """Whether caches hold a sequence, and main memory what is offloaded."""
    if machine is None or machine.gpu is None:
        return True
    gpu_bytes, c = machine.gpu.memory_bytes, config.cluster
    offloaded = 0
    for role, section, gpus in (
        ("policy", config.policy, c.gpus_per_policy_rank),
        ("critic", config.critic, c.gpus_per_critic_rank),
    ):
        if gpus and role in facts:
            settings = engine_settings(section, gpus, facts[role])
            offloaded += c.policy_ranks * sum(training_memory(config, settings, facts[role], role).values())
    fits = offloaded <= machine.memory_bytes * machine.nodes
    return fits and all(share.held(gpu_bytes) >= 1 for share in vllm_shares(config, facts))


def _combine(config: Config, needs: frozenset[str], facts: Facts, machine: Machine | None) -> bool:
    """Whether changed settings are refused for another reason than memory: ranks that would share a GPU, say."""
    gpus = [tenant.gpus for tenant in tenants(config, facts, None) for _ in range(tenant.count)]
    try:
        check_combinations(config, needs, facts["policy"], machine, gpus)
    except ConfigError:
        return False
    return True


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


def _options(config: Config, facts: Facts, over: list[GpuUse]) -> list[Option]:
    """What may lower what these GPUs hold."""
    roles, c, options = {tenant.role for use in over for tenant in use.tenants}, config.cluster, []
    for role, section, gpus in (
        ("policy", config.policy, c.gpus_per_policy_rank),
        ("critic", config.critic, c.gpus_per_critic_rank),
    ):
        if role in roles:
            options += training_options(config, role, engine_settings(section, gpus, facts[role]))
    if config.algorithm.distillation is not None:  # teachers are whole on each rank
        options = [option for option in options if option.text != "policy.zero_stage=3"]
    if "rollout" in roles and config.rollout.engine == "transformers":
        rows = rows_side_by_side(config)
        fewer = [rows // 2**halvings for halvings in range(1, 8) if rows // 2**halvings >= 1]
        options += [Option(f"rollout.max_sequences={n}", {"rollout.max_sequences": n}) for n in fewer]
    share = next((s for s in vllm_shares(config, facts) if s.section == "rollout"), None)
    if share is not None:
        options += _shares(share, over, utilization(c.gpus_per_rollout_engine)[0]) + _wider_engines(config)
    return options + _alone(over)


def _alone(over: list[GpuUse]) -> list[Option]:
    """A whole GPU for each actor that shares one."""
    roles = {tenant.role: tenant.gpus for use in over if len(use.tenants) > 1 for tenant in use.tenants}
    changes = {f"cluster.{_GPUS_OF[role]}": 1.0 for role, gpus in roles.items() if gpus < 1}
    return [Option(" ".join(f"{key}=1" for key in changes), changes)] if changes else []


def _shares(share: VllmShare, over: list[GpuUse], default: float) -> list[Option]:
    """The least share for an engine that has too little, or the largest that leaves room for what is beside it; the default
    for one that has more."""
    gpu = over[0].gpu
    assert gpu is not None
    fitting = [share.least_utilization(gpu.memory_bytes)] if share.held(gpu.memory_bytes) < 1 else []
    for use in over:
        engines = [tenant for tenant in use.tenants if tenant.role == "rollout"]
        if engines:
            others = use.bytes - sum(tenant.bytes for tenant in engines) + CONTEXT * len(engines)
            fitting.append(floor((gpu.memory_bytes - others) / len(engines) / gpu.memory_bytes * 100) / 100)
    if default < share.utilization:
        fitting.append(default)
    return [
        Option(f"rollout.gpu_memory_utilization={value:g}", {"rollout.gpu_memory_utilization": value})
        for value in fitting
        if LEAST_UTILIZATION <= value <= MOST_UTILIZATION
    ]


def _wider_engines(config: Config) -> list[Option]:
    """Fewer engines with more GPUs each, on no more GPUs than they have."""
    gpus, engines = config.cluster.gpus_per_rollout_engine, config.cluster.rollout_engines
    wider = [2**n * int(gpus) for n in range(1, 4) if gpus >= 1 and engines >= 2**n]
    options = []
    for each in wider:
        fewer = engines * int(gpus) // each
        changes = {
            "rollout.tensor_parallel_size": each,
            "cluster.gpus_per_rollout_engine": each,
            "cluster.rollout_engines": fewer,
        }
        options.append(Option(" ".join(f"{key}={value}" for key, value in changes.items()), changes))
    return options
