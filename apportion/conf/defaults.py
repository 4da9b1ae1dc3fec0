"""Choose what the configuration leaves to the device of each role. null in a configuration gets its value here, once, for
the plan and for the run alike."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from apportion.actors.engine_settings import EngineSettings
from apportion.conf.models import ModelFacts, read_model
from apportion.conf.schema import Config
from apportion.conf.schema_experience import JudgeConfig, RolloutConfig
from apportion.conf.schema_models import EngineConfig

CHECKPOINTING_ABOVE = 1_000_000_000  # parameters; below it the second forward pass costs more than the memory is worth
# Of one reduction of gradients on a GPU: 0.4 GB in bfloat16, twice that where several ranks overlap it with the backward
# pass. A weight that is larger is reduced by itself.
BUCKET_ELEMENTS = 200_000_000


@dataclass(frozen=True)
class Choice:
    """One value that a configuration leaves to the device, and the reason for it. `key` is a configuration key, or a plain
    name where there is none."""

    key: str
    value: int | float | bool
    why: str


@dataclass(frozen=True)
class RolloutSettings:
    """Of one engine, all definite."""

    max_sequences: int
    compile: bool
    gpu_memory_utilization: float  # share of each GPU that the engine takes for itself; without meaning on a CPU


def engine_settings(section: EngineConfig, gpus: float, model: ModelFacts | None) -> EngineSettings:
    """What the training engine of a policy or critic is set to. `gpus` is what each of its ranks has; `model` is None where
    its size is not known."""
    given = {f.name: getattr(section, f.name) for f in fields(EngineSettings) if hasattr(section, f.name)}
    on_gpu = gpus > 0
    return EngineSettings(
        **given | _by_name(training_choices(section, gpus, model)),
        fused_adam=on_gpu and not section.offload_optimizer,  # offloaded, DeepSpeed's own Adam steps on the host
        overlap_comm=on_gpu,
        bucket_elements=BUCKET_ELEMENTS if on_gpu else EngineSettings.bucket_elements,
    )


def policy_settings(config: Config, model: ModelFacts | None) -> EngineSettings:
    """What the policy's training engine is set to."""
    return engine_settings(config.policy, config.cluster.gpus_per_policy_rank, model)


def rollout_settings(rollout: RolloutConfig, gpus: float) -> RolloutSettings:
    """What an engine with so many GPUs is set to."""
    given = {f.name: getattr(rollout, f.name) for f in fields(RolloutSettings)}
    return RolloutSettings(**given | _by_name(rollout_choices(rollout, gpus)))


def judge_utilization(judge: JudgeConfig, gpus: float) -> float:
    """Share of each GPU that a judge's engine takes."""
    return utilization(gpus)[0] if judge.gpu_memory_utilization is None else judge.gpu_memory_utilization


def training_choices(section: EngineConfig, gpus: float, model: ModelFacts | None) -> list[Choice]:
    """The keys of a policy or critic that are null."""
    at, on_gpu, choices = section.section, gpus > 0, []
    if section.zero_stage is None:
        why = "accumulates gradients in float32 and shards them" if on_gpu else "main memory holds the whole optimizer"
        choices.append(Choice(f"{at}.zero_stage", 2 if on_gpu else 0, why))
    if section.gradient_checkpointing is None:
        choices.append(Choice(f"{at}.gradient_checkpointing", *_checkpointing(on_gpu, model)))
    if section.logits_chunk_tokens is None:
        why = "fills a GPU's matrix kernels" if on_gpu else "fits a CPU's caches"
        choices.append(Choice(f"{at}.logits_chunk_tokens", 4096 if on_gpu else 512, why))
    return choices


def _checkpointing(on_gpu: bool, model: ModelFacts | None) -> tuple[bool, str]:
    if not on_gpu:
        return False, "main memory holds the activations"
    if model is None:
        return True, "the model's size is not known here"
    large = model.parameters > CHECKPOINTING_ABOVE
    return large, f"{model.parameters:,} parameters, {'above' if large else 'at most'} 1 billion"


def rollout_choices(rollout: RolloutConfig, gpus: float) -> list[Choice]:
    """The keys of the rollout that are null."""
    on_gpu, choices = gpus > 0, []
    if rollout.max_sequences is None:
        why = "a GPU decodes many rows in the time of one" if on_gpu else "enough rows for a CPU's cores"
        choices.append(Choice("rollout.max_sequences", 256 if on_gpu else 64, why))
    if rollout.compile is None:
        why = "CUDA graphs launch a step of decoding at once" if on_gpu else "graphs take a minute to build on a CPU"
        choices.append(Choice("rollout.compile", on_gpu, why))
    if rollout.gpu_memory_utilization is None:
        choices.append(Choice("rollout.gpu_memory_utilization", *utilization(gpus)))
    return choices


def utilization(gpus: float) -> tuple[float, str]:
    """Share of a GPU for an engine that has so many, and why.

    >>> utilization(0.5)[0], utilization(1)[0]
    (0.4, 0.9)
    """
    if 0 < gpus < 1:
        return round(0.8 * gpus, 4), f"0.8 x its share of {gpus:g}; the rest of the GPU is for others"
    return 0.9, "no other role is on its GPUs"


def left_to_device(config: Config, needs: frozenset[str], model: ModelFacts | None) -> list[Choice]:
    """Everything that a run's configuration leaves to the devices of its roles, those without a key too."""
    cluster = config.cluster
    choices = _trained(config.policy, cluster.gpus_per_policy_rank, cluster.policy_ranks, model)
    if "values" in needs:
        own = model if config.critic.model is None else read_model(config.critic.model, "critic.model")
        choices += _trained(config.critic, cluster.gpus_per_critic_rank, cluster.policy_ranks, own)
    gpus, on_vllm = cluster.gpus_per_rollout_engine, config.rollout.engine == "vllm"
    without_use = () if on_vllm and gpus else (() if on_vllm else ("compile",)) + ("gpu_memory_utilization",)
    choices += [c for c in rollout_choices(config.rollout, gpus) if c.key.rpartition(".")[2] not in without_use]
    if "critiques" in needs and cluster.gpus_per_judge and config.judge.engine == "vllm":
        if config.judge.gpu_memory_utilization is None:
            choices.append(Choice("judge.gpu_memory_utilization", *utilization(cluster.gpus_per_judge)))
        choices.append(Choice("judge: CUDA graphs", True, "launch a step of decoding at once"))
    return choices


def _trained(section: EngineConfig, gpus: float, ranks: int, model: ModelFacts | None) -> list[Choice]:
    at, settings = section.section, engine_settings(section, gpus, model)
    choices = training_choices(section, gpus, model)
    if settings.fused_adam:
        choices.append(Choice(f"{at}: fused AdamW", True, "steps in one kernel, without a float32 copy of the weights"))
    if settings.overlap_comm and settings.zero_stage > 0 and ranks > 1:
        choices.append(Choice(f"{at}: overlap_comm", True, "reduces gradients during the backward pass"))
    return choices


def _by_name(choices: list[Choice]) -> dict[str, Any]:
    return {choice.key.rpartition(".")[2]: choice.value for choice in choices}
