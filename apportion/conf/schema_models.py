"""Sections about models: which, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from apportion.conf.checks import LARGEST, MISSING, SMALLEST, above_zero, at_least, between, from_zero, one_of
from apportion.platform.errors import ConfigError


@dataclass
class ModelConfig:
    """The policy's starting weights, and the tokenizer."""

    path: str = MISSING  # folder, hub name, or builtin:smollm2-135m-instruct, builtin:tiny
    dtype: str = "bfloat16"  # of the forward pass; masters are always float32
    attention: str = "sdpa"
    trust_remote_code: bool = False
    chat_template: str | None = None  # a jinja file; null takes the tokenizer's

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, ("bfloat16", "float32", "float16"))
        one_of("model.attention", self.attention, ("sdpa", "eager", "flash_attention_2"))


@dataclass
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning; `lora=default` on the command line, or any policy.lora value."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        at_least("policy.lora.rank", self.rank, 1, 65_536)
        above_zero("policy.lora.alpha", self.alpha, 1e-6, 1e6)
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"policy.lora.dropout: got {self.dropout}, expected 0 to below 1 (1 drops all that adapters read)"
            )
        if not all(self.targets or [""]):
            raise ConfigError("policy.lora.targets: got none, expected the names of linear layers such as q_proj")


@dataclass
class EngineConfig:
    """What the policy's and the critic's training engine share."""

    section: ClassVar[str] = "engine"
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0  # of the linear and cosine schedules, at the last step
    zero_stage: int | None = None  # null: 2 on GPUs, 0 on CPUs
    offload_optimizer: bool = False
    gradient_checkpointing: bool | None = None  # null: on GPUs, above a billion parameters
    micro_batch_tokens: int = 2048  # padded tokens of one forward and backward pass
    # response positions whose logits exist at a time; null: 4096 on GPUs, 512 on CPUs
    logits_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        at = self.section
        one_of(f"{at}.schedule", self.schedule, ("constant", "linear", "cosine"))
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ConfigError(f"{at}.zero_stage: got {self.zero_stage}, expected 0, 1, 2 or 3")
        from_zero(f"{at}.learning_rate", self.learning_rate, 1e-15, 1000.0)
        from_zero(f"{at}.weight_decay", self.weight_decay, SMALLEST, 1000.0)
        from_zero(f"{at}.max_grad_norm", self.max_grad_norm, SMALLEST, LARGEST)
        at_least(f"{at}.warmup_steps", self.warmup_steps, 0)
        for name in ("adam_beta1", "adam_beta2"):
            between(f"{at}.{name}", getattr(self, name), 0.0, 1.0 - 1e-9)
        above_zero(f"{at}.adam_eps", self.adam_eps, SMALLEST, 1.0)  # a weight without a gradient is divided by it alone
        at_least(f"{at}.micro_batch_tokens", self.micro_batch_tokens, 16)
        at_least(f"{at}.logits_chunk_tokens", self.logits_chunk_tokens, 1)
        between(f"{at}.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError(f"{at}.offload_optimizer: got true with {at}.zero_stage=0, expected zero_stage 1, 2 or 3")


@dataclass
class PolicyConfig(EngineConfig):
    section: ClassVar[str] = "policy"
    # A group's responses stand behind one copy of their prompt in the update: less work where prompts are not short
    # beside responses. Needs model.attention=sdpa and full causal attention (no sliding window).
    share_prompts: bool = False
    lora: LoraConfig | None = None


@dataclass
class CriticConfig(EngineConfig):
    """Started only when the algorithm needs values."""

    section: ClassVar[str] = "critic"
    learning_rate: float = 1e-5
    model: str | None = None  # null: the policy's starting weights, with a fresh value head
    value_clip: float | None = 0.2
    warmup_steps_without_policy: int = 0  # first steps that train the critic alone

    def __post_init__(self) -> None:
        super().__post_init__()
        from_zero("critic.value_clip", self.value_clip, SMALLEST, LARGEST)
        at_least("critic.warmup_steps_without_policy", self.warmup_steps_without_policy, 0)


@dataclass
class ReferenceConfig:
    """The frozen model that KL is measured against; started only when something needs it."""

    model: str | None = None  # null: the policy's starting weights
    micro_batch_tokens: int = 4096

    def __post_init__(self) -> None:
        at_least("reference.micro_batch_tokens", self.micro_batch_tokens, 16)


@dataclass
class TeachersConfig:
    """Frozen models for algorithm.distillation, beside the policy on each of its ranks: a model's folder or name, or a
    run, of which the newest checkpoint is taken."""

    dpo: str | None = None
    other: str | None = None  # trained with preferences reversed, or a reference, as the variant asks
