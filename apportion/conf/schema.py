"""The typed configuration. Each dataclass is what one component sees; each checks itself and says got / expected.

Nothing here repairs a value. What one component alone cannot judge (combinations) is checked in `apportion.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from apportion.platform.errors import ConfigError, nearest


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid and value != MISSING:
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(valid)}{nearest(value, valid)}")


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name}: got {value}, expected at least {low}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}: got {value}, expected {low} to {high}")


@dataclass
class ModelConfig:
    """The policy's starting weights, and the tokenizer."""

    path: str = MISSING  # folder, hub name, or builtin:smollm2-135m-instruct, builtin:tiny
    dtype: str = "bfloat16"  # of the forward pass; masters are always float32
    attention: str = "sdpa"
    trust_remote_code: bool = False
    chat_template: str | None = None  # a jinja file; null takes the tokenizer's

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, ("bfloat16", "float32", "float16"))
        _one_of("model.attention", self.attention, ("sdpa", "eager", "flash_attention_2"))


@dataclass
class DataConfig:
    """Where prompts come from. A source is a path, `hf:NAME[:SPLIT]`, `gym:TASK`, or a mapping with `source`,
    `weight` and the source's own parameters; a list mixes sources by weight."""

    train: Any = MISSING
    eval: Any = None
    prompt_column: str = "prompt"
    system_prompt: str | None = None
    chat: bool = True  # render a text prompt as one user message through the chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int = 512
    on_bad_row: str = "error"
    shuffle: bool = True
    limit: int | None = None  # rows of each training source
    eval_limit: int | None = None

    def __post_init__(self) -> None:
        _one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        _at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        _at_least("data.limit", self.limit, 1)
        _at_least("data.eval_limit", self.eval_limit, 1)


@dataclass
class RolloutConfig:
    """Sampling. Behaviour log-probs are those of the distribution after temperature, top-p and top-k."""

    engine: str = "vllm"
    responses_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_response_tokens: int = 256
    response_column: str | None = None  # with a distillation: learn from the data's responses (hh: chosen), sample none
    stop: list[str] = field(default_factory=list)
    tensor_parallel_size: int = 1
    max_sequences: int = 64  # decoded side by side in one engine
    gpu_memory_utilization: float = 0.5
    kv_cache_gib: float = 1.0  # on CPU
    compile: bool = False  # vLLM's compiled graphs: faster decoding, slower start
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        _one_of("rollout.engine", self.engine, ("vllm", "transformers"))
        _at_least("rollout.responses_per_prompt", self.responses_per_prompt, 1)
        _at_least("rollout.max_response_tokens", self.max_response_tokens, 1)
        _at_least("rollout.tensor_parallel_size", self.tensor_parallel_size, 1)
        _at_least("rollout.max_sequences", self.max_sequences, 1)
        _at_least("rollout.top_k", self.top_k, 0)
        _between("rollout.top_p", self.top_p, 1e-6, 1.0)
        if self.kv_cache_gib <= 0:
            raise ConfigError(f"rollout.kv_cache_gib: got {self.kv_cache_gib}, expected above 0")
        _between("rollout.gpu_memory_utilization", self.gpu_memory_utilization, 0.05, 0.98)
        if self.temperature <= 0:
            raise ConfigError(
                f"rollout.temperature: got {self.temperature}, expected above 0 (greedy has no policy gradient)"
            )


@dataclass
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning; `lora=default` on the command line, or any policy.lora value."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        _at_least("policy.lora.rank", self.rank, 1)
        _between("policy.lora.dropout", self.dropout, 0.0, 1.0)
        if not self.targets:
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
    zero_stage: int = 0
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False
    micro_batch_tokens: int = 2048  # padded tokens of one forward and backward pass
    logits_chunk_tokens: int = 512  # response positions whose logits exist at a time

    def __post_init__(self) -> None:
        at = self.section
        _one_of(f"{at}.schedule", self.schedule, ("constant", "linear", "cosine"))
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"{at}.zero_stage: got {self.zero_stage}, expected 0, 1, 2 or 3")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            _at_least(f"{at}.{name}", getattr(self, name), 0)
        for name in ("adam_beta1", "adam_beta2"):
            _between(f"{at}.{name}", getattr(self, name), 0.0, 1.0 - 1e-9)
        _at_least(f"{at}.micro_batch_tokens", self.micro_batch_tokens, 16)
        _at_least(f"{at}.logits_chunk_tokens", self.logits_chunk_tokens, 1)
        _between(f"{at}.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)


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
        _at_least("critic.value_clip", self.value_clip, 0)
        _at_least("critic.warmup_steps_without_policy", self.warmup_steps_without_policy, 0)


@dataclass
class ReferenceConfig:
    """The frozen model that KL is measured against; started only when something needs it."""

    model: str | None = None  # null: the policy's starting weights
    micro_batch_tokens: int = 4096

    def __post_init__(self) -> None:
        _at_least("reference.micro_batch_tokens", self.micro_batch_tokens, 16)


@dataclass
class EnvironmentConfig:
    """What the policy acts in, turn by turn; without `cls`, a response is one turn. `cls` is microwave, gymnasium,
    textarena or a dotted path of a class of one's own; rollout.max_response_tokens bounds all turns and observations
    of an episode together."""

    cls: str | None = None
    params: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the class
    workers: int = 1  # actors, each with many environments
    threads: int = 16  # synchronous steps under way at once in one actor
    max_turns: int = 8
    max_turn_tokens: int | None = None  # of one action; null: what is left of the response
    step_timeout_seconds: float = 10.0
    observation_role: str = "user"  # in the chat template

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "max_turns", "max_turn_tokens"):
            _at_least(f"environment.{name}", getattr(self, name), 1)
        if self.step_timeout_seconds <= 0:
            raise ConfigError(f"environment.step_timeout_seconds: got {self.step_timeout_seconds}, expected above 0")


@dataclass
class RewardConfig:
    """Rewards are the weighted sum of `functions`. One entry is a dotted path, `file.py:function`, a ready-made
    verifier's name, or a mapping with `function`, `weight`, `timeout_seconds` and `params`; `model:PATH` is a reward
    model and `http://...` (or a list of addresses under `urls`) a service. With an environment, whose rewards are added
    with weight 1, `functions` may be null."""

    functions: Any = MISSING
    workers: int = 1
    timeout_seconds: float = 60.0  # of one call, unless the entry says otherwise
    max_failed_share: float = 0.1
    clip: float | None = None  # rewards are clamped to [-clip, clip]

    def __post_init__(self) -> None:
        _at_least("reward.workers", self.workers, 1)
        _between("reward.max_failed_share", self.max_failed_share, 0.0, 1.0)
        _at_least("reward.clip", self.clip, 0)
        if self.timeout_seconds <= 0:
            raise ConfigError(f"reward.timeout_seconds: got {self.timeout_seconds}, expected above 0")


@dataclass
class JudgeConfig:
    """Who says which steps of a response are wrong; started only when the algorithm needs critiques. One of three:
    `function` alone, a dotted path or `file.py:function`; `model` alone, a model on an engine of the run's own; `url`
    (one OpenAI-compatible address or a list, up to /v1) with `model`, the name it serves."""

    function: str | None = None
    model: str | None = None
    url: Any = None
    api_key_env: str | None = None  # name of the environment variable that holds the address's key
    critiques: int | None = None  # of each response; null: as many as the credit method asks for
    delimiter: str = "\n\n"  # what separates two steps
    answer_column: str | None = "answer"  # the reference answer that the judge is shown, where a row has it; null: none
    temperature: float = 0.7
    max_tokens: int = 1024  # of one critique
    context_tokens: int = 8192  # a longer prompt and critique is not asked and counted as too_long
    timeout_seconds: float = 120.0  # of one critique
    batch_timeout_seconds: float = 900.0  # of all critiques of a batch; what is late has failed
    retries: int = 2  # of an address
    concurrency: int = 16  # critiques under way at a time, in each worker
    workers: int = 1
    cache_folder: str | None = None  # null: `critiques` in the run's folder
    max_failed_share: float = 1.0  # of a step's critiques; above it the run stops
    engine: str = "vllm"
    dtype: str = "bfloat16"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    kv_cache_gib: float = 1.0  # on CPU

    def __post_init__(self) -> None:
        _one_of("judge.engine", self.engine, ("vllm", "transformers"))
        _one_of("judge.dtype", self.dtype, ("bfloat16", "float32", "float16"))
        for name in ("critiques", "max_tokens", "concurrency", "workers", "tensor_parallel_size"):
            _at_least(f"judge.{name}", getattr(self, name), 1)
        for name in ("temperature", "retries"):
            _at_least(f"judge.{name}", getattr(self, name), 0)
        _between("judge.max_failed_share", self.max_failed_share, 0.0, 1.0)
        _between("judge.gpu_memory_utilization", self.gpu_memory_utilization, 0.05, 0.98)
        for name in ("timeout_seconds", "batch_timeout_seconds", "kv_cache_gib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"judge.{name}: got {getattr(self, name)}, expected above 0")
        if not self.delimiter:
            raise ConfigError("judge.delimiter: got an empty text, expected what separates two steps")
        if self.context_tokens <= self.max_tokens:
            raise ConfigError(
                f"judge.context_tokens: got {self.context_tokens}, expected more than judge.max_tokens={self.max_tokens}"
            )


@dataclass
class KlConfig:
    """Distance to the reference: in the reward (per token), in the loss, or nowhere."""

    place: str = "none"
    coefficient: float = 0.0
    estimator: str = "k3"
    target: float | None = None  # with a horizon: the adaptive coefficient
    horizon: int = 10000

    def __post_init__(self) -> None:
        _one_of("algorithm.kl.place", self.place, ("none", "reward", "loss"))
        _one_of("algorithm.kl.estimator", self.estimator, ("k1", "k2", "k3", "abs"))
        _at_least("algorithm.kl.coefficient", self.coefficient, 0)
        _at_least("algorithm.kl.horizon", self.horizon, 1)
        if self.target is not None and self.place == "none":
            raise ConfigError("algorithm.kl.target: got a value with place=none, expected place=reward or place=loss")


@dataclass
class CorrectionConfig:
    """Importance weights for the gap between the rollout engine's and the trainer's log-probs."""

    method: str = "truncate"
    level: str = "token"
    cap: float = 2.0
    bound: float = 0.5  # |log-prob difference| past which a token counts in mismatch/share_beyond_bound

    def __post_init__(self) -> None:
        _one_of("algorithm.correction.method", self.method, ("none", "truncate", "mask"))
        _one_of("algorithm.correction.level", self.level, ("token", "sequence"))
        _at_least("algorithm.correction.cap", self.cap, 1.0)


@dataclass
class AlgorithmConfig:
    """algorithm = credit x surrogate x reduction (+ KL, selection, shaping). Components are mappings with a `name`
    (of the registry, or a dotted path of your own) and the parameters of that component. `distillation` takes the
    surrogate's place: the loss then comes from `teachers`, and credit is for the log alone."""

    name: str = MISSING
    credit: dict[str, Any] = MISSING
    surrogate: dict[str, Any] | None = MISSING  # null with a distillation
    distillation: dict[str, Any] | None = None
    reduction: dict[str, Any] = MISSING
    shaping: list[Any] = field(default_factory=list)
    selection: list[Any] = field(default_factory=list)
    kl: KlConfig = field(default_factory=KlConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    entropy_coefficient: float = 0.0
    updates_per_batch: int = 1  # optimiser steps that one batch is cut into
    epochs: int = 1  # passes over one batch

    def __post_init__(self) -> None:
        _at_least("algorithm.updates_per_batch", self.updates_per_batch, 1)
        _at_least("algorithm.epochs", self.epochs, 1)
        if self.surrogate is None and self.distillation is None:
            raise ConfigError(
                "algorithm.surrogate: got null, expected a mapping with a name, or algorithm.distillation"
            )
        if self.surrogate not in (None, MISSING) and self.distillation is not None:
            raise ConfigError("algorithm.surrogate: got one beside algorithm.distillation, expected null")


@dataclass
class TeachersConfig:
    """Frozen models for algorithm.distillation, beside the policy on each of its ranks: a model's folder or name, or a
    run, of which the newest checkpoint is taken."""

    dpo: str | None = None
    other: str | None = None  # trained with preferences reversed, or a reference, as the variant asks


@dataclass
class ClusterConfig:
    """What runs where. CPUs are Ray's accounting; with no GPU, sampling and updating take turns on all cores."""

    address: str | None = None  # null: RAY_ADDRESS if set (a submitted job), else an embedded local Ray
    policy_ranks: int = 1
    rollout_engines: int = 1
    reference_ranks: int = 1
    gpus_per_policy_rank: float = 0.0
    gpus_per_rollout_engine: float = 0.0  # a whole number times rollout.tensor_parallel_size
    gpus_per_reference_rank: float = 0.0
    gpus_per_judge: float = 0.0  # of each worker; a whole number times judge.tensor_parallel_size
    gpus_per_critic_rank: float = 0.0  # the critic has as many ranks as the policy
    threads: int | None = None  # of each compute actor; null: every core of its node
    start_timeout_seconds: float = 600.0
    call_timeout_seconds: float = 1800.0  # no wait on an actor is longer
    object_store_gib: float | None = None

    def __post_init__(self) -> None:
        for name in ("policy_ranks", "rollout_engines", "reference_ranks"):
            _at_least(f"cluster.{name}", getattr(self, name), 1)
        for name in ("start_timeout_seconds", "call_timeout_seconds", "threads"):
            _at_least(f"cluster.{name}", getattr(self, name), 1)
        for name in (
            "gpus_per_policy_rank",
            "gpus_per_rollout_engine",
            "gpus_per_reference_rank",
            "gpus_per_judge",
            "gpus_per_critic_rank",
        ):
            _at_least(f"cluster.{name}", getattr(self, name), 0)


@dataclass
class TrainConfig:
    steps: int = 100
    prompts_per_step: int = 8  # groups of rollout.responses_per_prompt trajectories
    deterministic: bool = False
    max_minutes: float | None = None  # stop cleanly, with a checkpoint, once this long has passed
    sync_check: bool = True  # prove by checksums that every engine holds the weights, every sync

    def __post_init__(self) -> None:
        _at_least("train.steps", self.steps, 0)
        _at_least("train.prompts_per_step", self.prompts_per_step, 1)
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ConfigError(f"train.max_minutes: got {self.max_minutes}, expected above 0 or null")


@dataclass
class EvaluationConfig:
    every_steps: int = 0  # 0: only before and after
    before: bool = True
    after: bool = True
    greedy: bool = True
    samples: int = 0  # responses a prompt for avg@k and pass@k, beside the greedy one
    k: list[int] = field(default_factory=list)
    temperature: float = 1.0
    max_response_tokens: int | None = None  # null: rollout's
    correct_at: float = 1.0  # a reward of at least this is a correct answer
    show: int = 3  # example answers kept for the summary

    def __post_init__(self) -> None:
        _at_least("evaluation.every_steps", self.every_steps, 0)
        _at_least("evaluation.samples", self.samples, 0)
        _at_least("evaluation.max_response_tokens", self.max_response_tokens, 1)
        _at_least("evaluation.show", self.show, 0)
        if self.temperature <= 0:
            raise ConfigError(
                f"evaluation.temperature: got {self.temperature}, expected above 0 (greedy is evaluation.greedy)"
            )
        for k in self.k:
            if not 1 <= k <= self.samples:
                raise ConfigError(f"evaluation.k: got {k}, expected 1 to evaluation.samples={self.samples}")


@dataclass
class TrackingConfig:
    console: bool = True
    jsonl: bool = True
    tensorboard: bool = False
    wandb: str = "off"
    wandb_project: str = "apportion"
    wandb_entity: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    samples_per_step: int = 4  # whole trajectories kept each step
    plots: bool = True

    def __post_init__(self) -> None:
        _one_of("tracking.wandb", self.wandb, ("online", "offline", "off"))
        _at_least("tracking.samples_per_step", self.samples_per_step, 0)


@dataclass
class CheckpointConfig:
    every_steps: int = 0  # 0: only at the end
    keep: int = 2  # newest resumable checkpoints kept
    final: bool = True

    def __post_init__(self) -> None:
        _at_least("checkpoint.every_steps", self.every_steps, 0)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclass
class Config:
    """A whole run."""

    seed: int = 0
    recipe: str = "run"  # what a run without a name is called after
    run_name: str | None = None  # null: made from the recipe, the time and a random tail
    runs_folder: str = "runs"
    resume: str | None = None  # a run's folder or name, or one of its checkpoints
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
