"""The typed configuration. Each dataclass is what one component sees; each checks itself and says got / expected.

Nothing here repairs a value. What one component alone cannot judge (combinations) is checked in `apportion.plan`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from apportion.conf.checks import (
    COLDEST,
    HOTTEST,
    LARGEST,
    LARGEST_GIB,
    LARGEST_SEED,
    LONGEST_MINUTES,
    LONGEST_SECONDS,
    MOST_ACTORS,
    MOST_THREADS,
    SHORTEST_MINUTES,
    SMALLEST_STORE_GIB,
    above_zero,
    at_least,
    between,
    check_cluster_address,
    from_zero,
    one_of,
)
from apportion.conf.schema_algorithm import AlgorithmConfig, CorrectionConfig, KlConfig
from apportion.conf.schema_experience import DataConfig, EnvironmentConfig, JudgeConfig, RewardConfig, RolloutConfig
from apportion.conf.schema_models import (
    CriticConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    PolicyConfig,
    ReferenceConfig,
    TeachersConfig,
)
from apportion.platform.errors import ConfigError

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CorrectionConfig",
    "CriticConfig",
    "DataConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "JudgeConfig",
    "KlConfig",
    "LoraConfig",
    "ModelConfig",
    "PolicyConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RolloutConfig",
    "TeachersConfig",
    "TrackingConfig",
    "TrainConfig",
]


SMALLEST_GPU_SHARE, MOST_GPUS = 0.001, 1024  # of one actor


@dataclass
class ClusterConfig:
    """What runs where. CPUs are Ray's accounting; with no GPU, sampling and updating take turns on all cores."""

    address: str | None = None  # null: RAY_ADDRESS if set (a submitted job), else an embedded local Ray
    policy_ranks: int = 1
    rollout_engines: int = 1
    reference_ranks: int = 1
    gpus_per_policy_rank: float = 0.0  # 1, or a part of one for a single rank
    gpus_per_rollout_engine: float = 0.0  # rollout.tensor_parallel_size, or a part of one
    gpus_per_reference_rank: float = 0.0  # 1, or a part of one
    gpus_per_judge: float = 0.0  # of each worker: judge.tensor_parallel_size, or a part of one
    gpus_per_critic_rank: float = 0.0  # the critic has as many ranks as the policy
    gpus_per_reward_worker: float = 0.0  # for reward models and functions that use one
    # Of each compute actor; null: the share of its node's cores that its GPUs are of the node's, all without a GPU
    threads: int | None = None
    start_timeout_seconds: float = 600.0
    call_timeout_seconds: float = 1800.0  # no actor may go longer without progress (docs/reliability.md)
    download_timeout_seconds: float = 7200.0  # for all models of the hub, before actors start
    object_store_gib: float | None = None
    weight_transfer: str = "object_store"  # or broadcast: NCCL between GPUs, gloo without
    memory_check: bool = (
        True  # false: estimates of GPU memory (activations, logits) refuse nothing, firm parts still do
    )

    def __post_init__(self) -> None:
        check_cluster_address(self.address)
        for name in ("policy_ranks", "rollout_engines", "reference_ranks"):
            at_least(f"cluster.{name}", getattr(self, name), 1, MOST_ACTORS)
        for name in ("start_timeout_seconds", "call_timeout_seconds", "download_timeout_seconds"):
            at_least(f"cluster.{name}", getattr(self, name), 1, LONGEST_SECONDS)
        at_least("cluster.threads", self.threads, 1, MOST_THREADS)
        at_least("cluster.object_store_gib", self.object_store_gib, SMALLEST_STORE_GIB, LARGEST_GIB)
        one_of("cluster.weight_transfer", self.weight_transfer, ("object_store", "broadcast"))
        for name in (
            "gpus_per_policy_rank",
            "gpus_per_rollout_engine",
            "gpus_per_reference_rank",
            "gpus_per_judge",
            "gpus_per_critic_rank",
            "gpus_per_reward_worker",
        ):
            from_zero(f"cluster.{name}", getattr(self, name), SMALLEST_GPU_SHARE, MOST_GPUS)


@dataclass
class TrainConfig:
    steps: int = 100
    prompts_per_step: int = 8  # groups of rollout.responses_per_prompt trajectories
    deterministic: bool = False
    max_minutes: float | None = None  # stop cleanly, with a checkpoint, this long after the start or the resume
    sync_check: bool = True  # prove by checksums, and by sync/gap, that every engine holds the weights
    # Names or glob patterns of tensors that a sync may leave unproved (docs/weights.md).
    sync_unproved: list[str] = field(default_factory=list)
    # Largest sync/gap, in nats, before the run stops; null: the larger of 0.02 and 5 x sync/baseline
    max_sync_gap: float | None = None

    def __post_init__(self) -> None:
        at_least("train.steps", self.steps, 0)
        at_least("train.prompts_per_step", self.prompts_per_step, 1, 1_000_000)
        above_zero("train.max_minutes", self.max_minutes, SHORTEST_MINUTES, LONGEST_MINUTES, " or null")
        above_zero("train.max_sync_gap", self.max_sync_gap, 1e-9, LARGEST, " or null")


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
        at_least("evaluation.every_steps", self.every_steps, 0)
        at_least("evaluation.samples", self.samples, 0, 1_000_000)
        at_least("evaluation.max_response_tokens", self.max_response_tokens, 1)
        at_least("evaluation.show", self.show, 0)
        above_zero("evaluation.temperature", self.temperature, COLDEST, HOTTEST, " (greedy is evaluation.greedy)")
        between("evaluation.correct_at", self.correct_at, -LARGEST, LARGEST)
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
        one_of("tracking.wandb", self.wandb, ("online", "offline", "off"))
        at_least("tracking.samples_per_step", self.samples_per_step, 0)


@dataclass
class CheckpointConfig:
    every_steps: int = 0  # 0: not by steps
    every_minutes: float | None = 10.0  # of training, since the last one; looked at after each step; null or 0: never
    keep: int = 2  # newest resumable checkpoints kept
    final: bool = True

    def __post_init__(self) -> None:
        at_least("checkpoint.every_steps", self.every_steps, 0)
        from_zero("checkpoint.every_minutes", self.every_minutes, SHORTEST_MINUTES, LONGEST_MINUTES)
        at_least("checkpoint.keep", self.keep, 1)


@dataclass
class Config:
    """A whole run."""

    seed: int = 0
    recipe: str = "run"  # what a run without a name is called after
    run_name: str | None = None  # null: made from the recipe, the time and a random tail
    runs_folder: str = "runs"
    resume: str | None = None  # a run's folder or name, or one of its checkpoints
    # Run what the configuration of somebody else's run names (docs/reliability.md); counts on the command line alone
    trust_run: bool = False
    before: list[str] = field(default_factory=list)  # stages to run first, unless their runs have ended
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

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, LARGEST_SEED - self.cluster.rollout_engines)  # each engine has one of its own
        self.runs_folder = os.path.expanduser(self.runs_folder)
        self.resume = self.resume and os.path.expanduser(self.resume)
