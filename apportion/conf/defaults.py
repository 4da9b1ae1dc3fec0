"""Choose what the configuration leaves open by the device of each role: null in a configuration is settled here, once, for
the plan and for the run alike."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from apportion.actors.engine_settings import EngineSettings
from apportion.conf.models import ModelFacts
from apportion.conf.schema import Config
from apportion.conf.schema_experience import JudgeConfig, RolloutConfig
from apportion.conf.schema_models import EngineConfig

CHECKPOINTING_ABOVE = 1_000_000_000  # parameters; below it the second forward pass costs more than the memory is worth
BUCKET_ELEMENTS = 200_000_000  # on a GPU, of one reduction of gradients


@dataclass(frozen=True)
class Choice:
    """One value that a configuration leaves to the device, and why it is what it is."""

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
    left = _by_name(training_choices(section, gpus, model))
    on_gpu = gpus > 0
    return EngineSettings(
        **{name: value for name, value in given.items() if value is not None},
        **left,
        bucket_elements=BUCKET_ELEMENTS if on_gpu else None,
    )


def policy_settings(config: Config, model: ModelFacts | None) -> EngineSettings:
    """What the policy's training engine is set to."""
    return engine_settings(config.policy, config.cluster.gpus_per_policy_rank, model)


def training_choices(section: EngineConfig, gpus: float, model: ModelFacts | None) -> list[Choice]:
    """Every value that the section leaves to the device."""
    at, on_gpu = section.section, gpus > 0
    choices = []
    if section.zero_stage is None:
        why = "gradients in float32 and parted among ranks" if on_gpu else "on CPUs one rank has nothing to part"
        choices.append(Choice(f"{at}.zero_stage", 2 if on_gpu else 0, why))
    if section.gradient_checkpointing is None:
        if not on_gpu:
            choice = Choice(f"{at}.gradient_checkpointing", False, "main memory holds the activations")
        elif model is None:
            choice = Choice(f"{at}.gradient_checkpointing", True, "the model's size is not known yet")
        else:
            large = model.parameters > CHECKPOINTING_ABOVE
            size = f"{model.parameters / 1e9:.1f} billion parameters, {'above' if large else 'at most'} 1 billion"
            choice = Choice(f"{at}.gradient_checkpointing", large, size)
        choices.append(choice)
    if section.logits_chunk_tokens is None:
        why = "large enough for a GPU's matrix kernels" if on_gpu else "small enough for a CPU's caches"
        choices.append(Choice(f"{at}.logits_chunk_tokens", 4096 if on_gpu else 512, why))
    return [
        *choices,
        Choice(f"{at}.fused_adam", on_gpu and not section.offload_optimizer, "one kernel, no copy of the weights"),
        Choice(f"{at}.overlap_comm", on_gpu, "reduce gradients beside the backward pass"),
    ]


def rollout_settings(rollout: RolloutConfig, gpus: float) -> RolloutSettings:
    """What an engine with so many GPUs is set to."""
    given = {f.name: getattr(rollout, f.name) for f in fields(RolloutSettings)}
    return RolloutSettings(**(given | _by_name(rollout_choices(rollout, gpus))))


def _by_name(choices: list[Choice]) -> dict[str, Any]:
    return {choice.key.rpartition(".")[2]: choice.value for choice in choices}


def rollout_choices(rollout: RolloutConfig, gpus: float) -> list[Choice]:
    """Every value that `rollout` leaves to the device."""
    on_gpu, choices = gpus > 0, []
    if rollout.max_sequences is None:
        why = "a GPU decodes many rows in the time of one" if on_gpu else "enough rows for a CPU's cores"
        choices.append(Choice("rollout.max_sequences", 256 if on_gpu else 64, why))
    if rollout.compile is None:
        why = "CUDA graphs: a step of decoding is one launch" if on_gpu else "on a CPU graphs take a minute to build"
        choices.append(Choice("rollout.compile", on_gpu, why))
    if rollout.gpu_memory_utilization is None:
        choices.append(Choice("rollout.gpu_memory_utilization", *utilization(gpus)))
    return choices


def judge_utilization(judge: JudgeConfig, gpus: float) -> float:
    """Share of each GPU that a judge's engine takes."""
    return utilization(gpus)[0] if judge.gpu_memory_utilization is None else judge.gpu_memory_utilization


def utilization(gpus: float) -> tuple[float, str]:
    """Share of a GPU for an engine that has so many, and why.

    >>> utilization(0.5)[0], utilization(1)[0]
    (0.4, 0.9)
    """
    if 0 < gpus < 1:
        return round(0.8 * gpus, 4), f"0.8 of the engine's share of {gpus:g}: the rest of the GPU is for others"
    return 0.9, "an engine with GPUs of its own takes nearly all of each"
