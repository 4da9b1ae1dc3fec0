"""Families of models whose changed weights are known to reach a vLLM engine, and those that are refused.

A dense model of any family is allowed: a sync that leaves one of its tensors behind fails and names it. A mixture of
experts is allowed if `make families` proved it (docs/weights.md), because vLLM loads experts in a way of their own for
each family.
"""

from __future__ import annotations

from typing import Any

from apportion.conf.models import read_description
from apportion.platform.errors import ConfigError

PROVED_MIXTURES = ("MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")


def check_family(path: str, engine: str) -> None:
    """ConfigError for a mixture of experts for which a sync to this rollout engine is not proved."""
    if engine != "vllm":
        return
    config = read_description(path)
    names = config.get("architectures") or []
    name = names[0] if names else config.get("model_type", "unknown architecture")
    if name not in PROVED_MIXTURES and _experts(config):
        raise ConfigError(
            f"model.path: got {path} ({name}), a mixture of experts for which weight syncs to vLLM are not proved; expected a "
            f"dense model, one of {', '.join(PROVED_MIXTURES)}, or rollout.engine=transformers"
        )


def _experts(config: dict[str, Any]) -> int:
    """How many experts a layer has, under the key that the family has for it; 0 for a dense model."""
    own = [value for key, value in config.items() if key.endswith("experts") and type(value) is int and value > 1]
    nested = [_experts(value) for value in config.values() if isinstance(value, dict)]
    return max([0, *own, *nested])
