"""Refuse a plan that no GPU of the machine can hold, and find what would fit: a smaller micro-batch, a setting, a smaller
model. Every answer is tried before it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil, floor
from typing import Any

from apportion.actors.engine_settings import EngineSettings
from apportion.conf.defaults import engine_settings
from apportion.conf.devices import Machine
from apportion.conf.gpu_memory import ESTIMATES
from apportion.conf.models import ModelFacts
from apportion.conf.placement import GpuUse, Tenant, place, size
from apportion.conf.schema_models import LoraConfig
from apportion.platform.errors import ConfigError

Facts = Mapping[str, ModelFacts | None]  # of the model of each role
_BATCHED = ("policy", "critic", "reference")  # sections with micro_batch_tokens
SMALL_CHUNK = 1024  # policy.logits_chunk_tokens where the default of a GPU is too much
_AT_ONCE = 3  # settings that are tried together
# Names of keys by what they cost a user: nothing, then time, then GPUs, then another kind of training.
_COSTS = (
    "logits_chunk_tokens",
    "gradient_checkpointing",
    "gpu_memory_utilization",
    "max_sequences",
    "tensor_parallel_size",
    "zero_stage",
    "gpus_per_policy_rank",
    "gpus_per_rollout_engine",
    "gpus_per_critic_rank",
    "gpus_per_reference_rank",
    "gpus_per_judge",
    "gpus_per_reward_worker",
    "policy_ranks",
    "offload_optimizer",
    "lora",
)


@dataclass(frozen=True)
class Option:
    """Settings that may make a plan fit, and how a user writes them."""

    text: str
    changes: dict[str, Any]  # by dotted key of one section and one name


@dataclass(frozen=True)
class Fit:
    """What a search needs to know of a run. A configuration is that of a run or of a preference stage."""

    machine: Machine | None  # None: nothing is known of it
    tenants: Callable[[Any, Facts], list[Tenant]]
    longest: int  # tokens that a micro-batch has to hold
    options: Callable[[Any, list[GpuUse]], list[Option]]  # for GPUs that hold too much
    accepts: Callable[[Any, Facts], bool] = lambda config, facts: True  # beside the sum on each GPU

    def check(self, config: Any, facts: Facts) -> list[GpuUse]:
        """What each GPU holds; ConfigError where that is more than it has."""
        uses = self._uses(config, facts) or []  # None: the numbers of GPUs do not fit, which check_devices refuses
        over = [use for use in uses if _excess(config, use) > 0]
        if over:
            raise ConfigError(self._refusal(config, facts, sorted(over, key=lambda use: -_excess(config, use))))
        return uses

    def _uses(self, config: Any, facts: Facts) -> list[GpuUse] | None:
        found = self.tenants(config, facts)
        if self.machine is None:
            return place(found, 1, sum(tenant.count * ceil(tenant.gpus) for tenant in found))
        return place(found, self.machine.nodes, self.machine.gpus, self.machine.gpu)

    def fits(self, config: Any, facts: Facts) -> bool:
        if config is None:  # refused by itself
            return False
        uses = self._uses(config, facts)
        return uses is not None and all(_excess(config, use) <= 0 for use in uses) and self.accepts(config, facts)

    def _refusal(self, config: Any, facts: Facts, over: list[GpuUse]) -> str:
        use = over[0]
        assert use.gpu is not None
        estimates = config.cluster.memory_check
        total = use.bytes if estimates else use.firm_bytes
        got = (
            f"GPU memory: got {size(total)} on one {use.gpu.name} ({_largest(use, estimates)}), expected at most its "
            f"{size(use.gpu.memory_bytes)}"
        )
        key, option = self._batch_key(config, use), self._option(config, facts, over)
        tokens = None if key is None else self._most_tokens(config, facts, key)
        if tokens is not None:
            also = "" if option is None else f", or {option}"
            return f"{got}; the largest {key} that fits is {tokens}{also}"
        answers = [] if option is None else [f"{option} fits"]
        largest = self._largest_model(config, facts, use)
        if largest is not None:
            answers.append(largest)
        none = "" if key is None else f"; no {key} fits"
        return f"{got}{none}; {', or '.join(answers) or 'expected more or larger GPUs'}"

    def _batch_key(self, config: Any, use: GpuUse) -> str | None:
        """The micro-batch that makes most activations on this GPU."""
        there = [t for t in use.tenants if _section(t.role) in _BATCHED]
        if not there or not config.cluster.memory_check:
            return None
        return f"{_section(max(there, key=lambda t: t.memory.get('activations', 0)).role)}.micro_batch_tokens"

    def _most_tokens(self, config: Any, facts: Facts, key: str) -> int | None:
        return _most(self.longest, _value(config, key), lambda n: self.fits(altered(config, {key: n}), facts))

    def _option(self, config: Any, facts: Facts, over: list[GpuUse]) -> str | None:
        """The fewest settings that fit, the cheapest of them; with a smaller micro-batch only where that takes fewer."""
        options = sorted(self.options(config, over), key=lambda option: _COSTS.index(_name(next(iter(option.changes)))))
        key = self._batch_key(config, over[0])
        for count in range(1, _AT_ONCE + 1):
            for chosen in combinations(options, count):
                if self.fits(altered(config, _merged(chosen)), facts):
                    return _text(chosen)
            if key is None or count == 1:
                continue
            for chosen in combinations(options, count - 1):
                made = altered(config, _merged(chosen))
                if made is not None and (tokens := self._most_tokens(made, facts, key)) is not None:
                    return f"{_text(chosen)} with {key}={tokens}"
        return None

    def _largest_model(self, config: Any, facts: Facts, use: GpuUse) -> str | None:
        """The largest model, in billions of parameters: as many layers fewer as the parameters are, everything else as it is
        but the smallest micro-batch."""
        own, key, gpus = facts["policy"], self._batch_key(config, use), config.cluster.gpus_per_policy_rank
        changes: dict[str, Any] = {}
        if config.policy.gradient_checkpointing is None:  # that default changes with the model's size
            changes["policy.gradient_checkpointing"] = engine_settings(config.policy, gpus, own).gradient_checkpointing
        if key is not None and _value(config, key) != self.longest:
            changes[key] = self.longest
        least = altered(config, changes)

        def fits(thousandths: int) -> bool:
            return self.fits(least, {role: _scaled(model, own, thousandths / 1000) for role, model in facts.items()})

        share = _most(1, 999, fits)
        if own is None or share is None:
            return None
        billions = own.parameters * share / 1e12
        largest = f"{floor(billions * 100) / 100:g}" if billions < 1 else f"{floor(billions * 10) / 10:g}"
        settings = " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())
        if not config.cluster.memory_check:  # activations do not count
            settings = ""
        at = f"with {settings}" if settings else "at these settings"
        return f"{at} a model of at most {largest} billion parameters fits"


def altered(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with other values; None where one of its checks refuses them."""
    try:
        for key, value in changes.items():
            section, _, name = key.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    except ConfigError:
        return None
    return config


def _merged(options: Iterable[Option]) -> dict[str, Any]:
    return {key: value for option in options for key, value in option.changes.items()}


def _text(options: Iterable[Option]) -> str:
    return " with ".join(option.text for option in options)


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _value(config: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _section(role: str) -> str:
    """Of the configuration; the ranks of a preference stage are set by `policy`."""
    return "policy" if role in ("sft", "dpo", "reward_model") else role


def _excess(config: Any, use: GpuUse) -> int:
    if use.gpu is None:
        return 0
    return (use.bytes if config.cluster.memory_check else use.firm_bytes) - use.gpu.memory_bytes


def _largest(use: GpuUse, estimates: bool) -> str:
    """The largest parts on this GPU."""
    parts = [
        (amount, f"{tenant.role} {name}")
        for tenant in use.tenants
        for name, amount in _parts(tenant).items()
        if amount and (estimates or name not in ESTIMATES)
    ]
    most = sorted(parts, key=lambda part: -part[0])[:4]
    return ", ".join(f"{name} {size(amount)}" for amount, name in most)


def _parts(tenant: Tenant) -> dict[str, int]:
    """Of what a GPU has to hold: an engine's share counts as one part, a start as another."""
    if tenant.start > sum(tenant.memory.values()):
        return {"whole model at its start": tenant.start}
    return tenant.memory


def _scaled(model: ModelFacts | None, own: ModelFacts | None, share: float) -> ModelFacts | None:
    if model is None or model != own:
        return model
    return replace(model, parameters=round(model.parameters * share), layers=max(1, round(model.layers * share)))


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from low to high that fits, None where low does not. What fits, fits when it is smaller.

    >>> _most(3, 10, lambda n: n < 8), _most(3, 10, lambda n: False)
    (7, None)
    """
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def training_options(config: Any, section: str, settings: EngineSettings) -> list[Option]:
    """What may lower the memory of the ranks of a section. `settings` are what it has now."""
    changes: dict[str, Any] = {f"{section}.zero_stage": 3, "cluster.policy_ranks": 2 * config.cluster.policy_ranks}
    if settings.logits_chunk_tokens > SMALL_CHUNK:
        changes[f"{section}.logits_chunk_tokens"] = SMALL_CHUNK
    for name in ("gradient_checkpointing", "offload_optimizer"):
        if not getattr(settings, name):
            changes[f"{section}.{name}"] = True
    options = [Option(f"{key}={str(value).lower()}", {key: value}) for key, value in changes.items()]
    if section == "policy" and config.policy.lora is None:
        options.append(Option("policy.lora.rank=16", {"policy.lora": LoraConfig()}))
    return options
