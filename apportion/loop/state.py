"""What the loop holds: who runs, how it is set, where it stands, and what a step has sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from apportion.actors.engines import Sampling
from apportion.batch import Prompt, Totals
from apportion.platform.cluster import Actor, Call


class PromptSource(Protocol):
    @property
    def skipped(self) -> dict[str, int]: ...
    @property
    def reasoning_left_out(self) -> int: ...
    def next_batch(self, prompts: int | None = None) -> list[Prompt]: ...
    def state(self) -> dict[str, int]: ...
    def load_state(self, state: dict[str, int]) -> None: ...


@dataclass
class Actors:
    """Everything that runs. Reference and critic are empty when nothing needs them."""

    rollout: list[Actor]
    reward: list[Actor]
    credit: Actor
    policy: list[Actor]
    reference: list[Actor] = field(default_factory=list)
    critic: list[Actor] = field(default_factory=list)
    environment: list[Actor] = field(default_factory=list)  # the rollout engines speak to them
    judge: list[Actor] = field(default_factory=list)


@dataclass
class LoopSettings:
    steps: int
    prompts_per_step: int
    responses_per_prompt: int
    sampling: Sampling
    minibatches: int
    policy_signals: bool  # old log-probs are a pass of their own
    selects: bool  # groups may be dropped, so sampling may take several rounds
    max_failed_share: float
    sync_check: bool
    sync_unproved: list[str]  # tensors that need not be proved
    call_timeout_seconds: float
    critic_only_steps: int
    samples_shown: int
    max_minutes: float | None
    checkpoint_every: int
    checkpoint_minutes: float | None
    checkpoint_final: bool
    seeds: dict[str, int]
    ranks: dict[str, dict[str, Any]]  # how each trained role is spread over ranks
    max_failed_critiques: float  # share of a step's critiques
    parts: int  # that an engine's prompts are sampled in, so that judges have one while it makes the next


@dataclass
class Progress:
    """Where the run stands; what a checkpoint carries beside the tensors."""

    step: int = 0
    policy_version: int = 0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    answers_before: list[dict[str, Any]] = field(default_factory=list)
    answers_after: list[dict[str, Any]] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    rollout_tokens: int = 0
    update_tokens: int = 0
    step_seconds: float = 0.0
    wall_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    sync_baseline: float | None = None  # gap of engine and trainer before the first sync; None: not measured


@dataclass
class Experience:
    """References to what a step has sampled and scored."""

    admitted: list[Any]
    groups: int
    totals: Totals
    seconds_sampling: float
    sampled_tokens: int = 0  # by the engines: without an environment's
    judging: list[list[Call]] = field(default_factory=list)  # of this round: for each rollout batch, one a judge
