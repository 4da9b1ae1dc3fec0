"""The typed configuration of the preference stages: what training's has in common with them, and a section of each.

One class a stage, so that a value which another stage would read is refused rather than ignored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from apportion.conf.checks import (
    LARGEST,
    LARGEST_GIB,
    LARGEST_SEED,
    LONGEST_MINUTES,
    LONGEST_SECONDS,
    MISSING,
    MOST_ACTORS,
    MOST_THREADS,
    SHORTEST_MINUTES,
    SMALLEST,
    SMALLEST_STORE_GIB,
    above_zero,
    at_least,
    between,
    check_cluster_address,
    check_warmup,
    from_zero,
    one_of,
)
from apportion.conf.devices import (
    check_attention,
    check_dtype,
    check_in_use,
    check_offload,
    check_ranks,
    check_ranks_fit,
    check_room,
)
from apportion.conf.machine import Machine, joins, this_machine
from apportion.conf.models import check_own_tokenizer, check_rows_of_several, check_targets, read_limits
from apportion.conf.placement import firm_bytes
from apportion.conf.preference_memory import check_gpu_memory
from apportion.conf.schema import (
    MOST_GPUS,
    SMALLEST_GPU_SHARE,
    CheckpointConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    TrackingConfig,
)
from apportion.platform.errors import ConfigError

# Those of algorithms.preference and data.pair_tokens, said again here because those import torch.
DPO_LOSSES = ("sigmoid", "ipo")
TOO_LONG = ("skip", "error", "truncate_prompt")


@dataclass
class PairDataConfig:
    """Where examples come from: sources as in training (files, `hf:NAME`, `function:NAME`). Which of the formats a row
    has is read from its columns."""

    train: Any = MISSING
    eval: Any = None
    eval_share: float = 0.0  # without `eval`: share of the training prompts that is held out
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    completion_column: str | None = None  # null: completion, or else response
    messages_column: str = "messages"
    margin_column: str | None = None  # how far apart the two answers are; for the reward model
    tools_column: str | None = "tools"  # what the chat template is given as tools, where a row has it; null: nothing
    label_column: str | None = "label"  # whether a completion is a good one, where a row has it; null: not read
    system_prompt: str | None = None
    chat: bool = True  # render through the chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int = 512
    max_tokens: int = 1024  # prompt and one answer
    too_long: str = "skip"  # skip (counted), error, or truncate_prompt (from its beginning; answers are never cut)
    packing: bool = False  # sequences one behind the other in one row, none of which sees another, instead of padding
    on_bad_row: str = "error"
    shuffle: bool = True
    limit: int | None = None  # rows of each training source
    eval_limit: int | None = None

    def __post_init__(self) -> None:
        one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        one_of("data.too_long", self.too_long, TOO_LONG)
        at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        at_least("data.max_tokens", self.max_tokens, 2)
        at_least("data.limit", self.limit, 1)
        at_least("data.eval_limit", self.eval_limit, 1)
        between("data.eval_share", self.eval_share, 0.0, 0.9)
        from_zero("data.eval_share", self.eval_share, 1e-9, 0.9)
        if self.eval is not None and self.eval_share > 0:
            raise ConfigError(f"data.eval_share: got {self.eval_share} beside data.eval, expected one of the two")


@dataclass
class SftConfig:
    reduction: dict[str, Any] = field(default_factory=lambda: {"name": "token_mean"})  # as algorithm.reduction


@dataclass
class RewardModelConfig:
    margin: float = 0.0  # that the scores of a pair should differ by; added to data.margin_column's
    center: float = 0.0  # weight of (r_chosen + r_rejected)^2

    def __post_init__(self) -> None:
        from_zero("reward_model.margin", self.margin, SMALLEST, LARGEST)
        from_zero("reward_model.center", self.center, SMALLEST, 1e6)


@dataclass
class DpoConfig:
    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalized: bool = False
    reverse: bool = False  # the rejected answer is the chosen one
    reference: str | None = None  # null: model.path

    def __post_init__(self) -> None:
        one_of("dpo.loss", self.loss, DPO_LOSSES)
        above_zero("dpo.beta", self.beta, 1e-9, 1e6)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"dpo.label_smoothing: got {self.label_smoothing}, expected 0 to below 0.5")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ConfigError(
                f"dpo.label_smoothing: got {self.label_smoothing} with dpo.loss={self.loss}, expected dpo.loss=sigmoid"
            )


@dataclass
class StageConfig:
    """How long, and in what portions."""

    epochs: float = 1.0
    steps: int | None = None  # optimiser steps, instead of epochs
    batch_size: int = 32  # pairs or demonstrations of one optimiser step, over all ranks
    deterministic: bool = False
    max_minutes: float | None = None  # stop cleanly, with a checkpoint, this long after the start or the resume

    def __post_init__(self) -> None:
        at_least("train.steps", self.steps, 0)
        at_least("train.batch_size", self.batch_size, 1, 10_000_000)
        above_zero("train.epochs", self.epochs, 1e-9, 1e6)
        above_zero("train.max_minutes", self.max_minutes, SHORTEST_MINUTES, LONGEST_MINUTES, " or null")


@dataclass
class HeldOutConfig:
    every_steps: int = 0  # 0: only before and after
    before: bool = True
    after: bool = True

    def __post_init__(self) -> None:
        at_least("evaluation.every_steps", self.every_steps, 0)


@dataclass
class RanksConfig:
    address: str | None = None  # null: RAY_ADDRESS if set (a submitted job), else an embedded local Ray
    policy_ranks: int = 1
    gpus_per_policy_rank: float = 0.0  # 1, or a part of one for a single rank
    # Of each rank; null: the share of its node's cores that its GPUs are of the node's, all without a GPU
    threads: int | None = None
    start_timeout_seconds: float = 600.0
    call_timeout_seconds: float = 1800.0  # no rank may go longer without progress (docs/reliability.md)
    download_timeout_seconds: float = 7200.0  # for all models of the hub, before actors start
    object_store_gib: float | None = None
    memory_check: bool = (
        True  # false: estimates of GPU memory (activations, logits) refuse nothing, firm parts still do
    )

    def __post_init__(self) -> None:
        check_cluster_address(self.address)
        at_least("cluster.policy_ranks", self.policy_ranks, 1, MOST_ACTORS)
        at_least("cluster.threads", self.threads, 1, MOST_THREADS)
        for name in ("start_timeout_seconds", "call_timeout_seconds", "download_timeout_seconds"):
            at_least(f"cluster.{name}", getattr(self, name), 1, LONGEST_SECONDS)
        at_least("cluster.object_store_gib", self.object_store_gib, SMALLEST_STORE_GIB, LARGEST_GIB)
        from_zero("cluster.gpus_per_policy_rank", self.gpus_per_policy_rank, SMALLEST_GPU_SHARE, MOST_GPUS)


@dataclass
class PreferencePolicyConfig(EngineConfig):
    section: ClassVar[str] = "policy"
    learning_rate: float = 1e-5
    lora: LoraConfig | None = None


@dataclass
class PreferenceConfig:
    """What every stage has."""

    stage: ClassVar[str] = ""
    pairs: ClassVar[bool] = True

    seed: int = 0
    recipe: str = "run"  # what a run without a name is called after
    run_name: str | None = None  # null: made from the recipe, the time and a random tail
    runs_folder: str = "runs"
    resume: str | None = None  # a run's folder or name, or one of its checkpoints
    # Run what the configuration of somebody else's run names (docs/reliability.md); counts on the command line alone
    trust_run: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: PairDataConfig = field(default_factory=PairDataConfig)
    policy: PreferencePolicyConfig = field(default_factory=PreferencePolicyConfig)
    cluster: RanksConfig = field(default_factory=RanksConfig)
    train: StageConfig = field(default_factory=StageConfig)
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, LARGEST_SEED)
        self.runs_folder = os.path.expanduser(self.runs_folder)
        self.resume = self.resume and os.path.expanduser(self.resume)


@dataclass
class SftRunConfig(PreferenceConfig):
    stage: ClassVar[str] = "sft"
    pairs: ClassVar[bool] = False
    sft: SftConfig = field(default_factory=SftConfig)


@dataclass
class RewardModelRunConfig(PreferenceConfig):
    stage: ClassVar[str] = "reward_model"
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)


@dataclass
class DpoRunConfig(PreferenceConfig):
    stage: ClassVar[str] = "dpo"
    dpo: DpoConfig = field(default_factory=DpoConfig)


STAGES: dict[str, type[PreferenceConfig]] = {c.stage: c for c in (SftRunConfig, RewardModelRunConfig, DpoRunConfig)}


def check(config: PreferenceConfig, machine: Machine | None = None) -> None:
    """ConfigError for values that are each sound and together cannot run. `machine` is the one that an embedded Ray would
    use (default: this one); it does not count when a cluster is joined."""
    data, policy, answers = config.data, config.policy, 2 if config.pairs else 1
    if data.max_prompt_tokens >= data.max_tokens:
        raise ConfigError(
            f"data.max_tokens: got {data.max_tokens} with data.max_prompt_tokens={data.max_prompt_tokens}, expected "
            "more, so that there is room for an answer"
        )
    needed = answers * data.max_tokens
    if policy.micro_batch_tokens < needed:
        both = ", both answers of a pair" if config.pairs else ""
        raise ConfigError(
            f"policy.micro_batch_tokens: got {policy.micro_batch_tokens}, expected at least {needed} = {answers} x "
            f"data.max_tokens{both}; raise it or lower data.max_tokens"
        )
    if config.train.steps is not None:
        check_warmup("policy", policy.warmup_steps, config.train.steps)
    check_offload("policy", policy.offload_optimizer, config.cluster.gpus_per_policy_rank)
    _check_ranks(config, machine)
    check_attention(config.model.attention, "cluster.gpus_per_policy_rank", config.cluster.gpus_per_policy_rank)
    if data.packing and config.model.attention != "sdpa":
        raise ConfigError(
            f"data.packing: got true with model.attention={config.model.attention}, expected model.attention=sdpa"
        )
    if data.packing:
        check_rows_of_several(config.model.path, data.max_tokens, "data.packing")
    if config.train.batch_size < config.cluster.policy_ranks:
        raise ConfigError(
            f"train.batch_size: got {config.train.batch_size} with cluster.policy_ranks={config.cluster.policy_ranks}, "
            "expected at least one example a rank"
        )
    if config.evaluation.every_steps and data.eval is None and not data.eval_share:
        raise ConfigError(
            f"evaluation.every_steps: got {config.evaluation.every_steps} without held-out examples, expected data.eval "
            "or data.eval_share"
        )
    if data.margin_column is not None and config.stage != "reward_model":
        raise ConfigError(
            f"data.margin_column: got {data.margin_column!r}, expected none: only reward-model reads margins"
        )
    check_own_tokenizer(config.model.path, chat_template=config.model.chat_template)
    limits = read_limits(config.model.path)
    if limits.context is not None and data.max_tokens > limits.context:
        raise ConfigError(
            f"data.max_tokens: got {data.max_tokens}, expected at most {limits.context}, the model's context"
        )
    if policy.lora is not None:
        check_targets(policy.lora.targets, config.model.path)
    if isinstance(config, DpoRunConfig) and config.dpo.reference:
        check_reference(config, config.dpo.reference)
    if not joins(config.cluster):
        here = machine or this_machine()
        check_in_use(here, firm_bytes(check_gpu_memory(config, here)))


def _check_ranks(config: PreferenceConfig, machine: Machine | None) -> None:
    ranks, gpus = config.cluster.policy_ranks, config.cluster.gpus_per_policy_rank
    check_ranks("cluster.gpus_per_policy_rank", gpus, ranks)
    if joins(config.cluster):
        return
    here = machine or this_machine()
    check_dtype("model.dtype", config.model.dtype, gpus, here)
    check_ranks_fit(ranks, gpus, here)
    check_room([gpus] * ranks, here)


def check_reference(config: DpoRunConfig, path: str) -> None:
    """ConfigError where DPO's reference could not read the longest sequence or every token; what its files do not say
    is passed over."""
    own, limits, longest = read_limits(config.model.path), read_limits(path, "dpo.reference"), config.data.max_tokens
    if limits.context is not None and longest > limits.context:
        raise ConfigError(
            f"dpo.reference: got {path} with a context of {limits.context} tokens, expected at least "
            f"data.max_tokens={longest}, or shorter examples"
        )
    if own.vocabulary is not None and limits.vocabulary is not None and limits.vocabulary < own.vocabulary:
        raise ConfigError(
            f"dpo.reference: got {path} with {limits.vocabulary} tokens, expected at least the {own.vocabulary} of "
            f"{config.model.path}, with the same tokenizer: it reads the policy's token ids"
        )
