"""Samples responses: a plain class around an engine, run as a Ray actor. Token ids in, packed Batch out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from apportion.actors.engines import EngineSpec, Request, Sample, Sampling, make_engine, seed_of
from apportion.actors.engines.given_responses import GivenResponses
from apportion.actors.environment_client import RemoteEnvironments
from apportion.actors.episodes import EpisodeRunner, EpisodeSpec, Seeds
from apportion.batch import Batch, Prompt, Trajectory
from apportion.platform import progress
from apportion.platform.channel import ChannelAddress
from apportion.platform.cluster import Actor
from apportion.platform.device_memory import DeviceMemory
from apportion.platform.process import ActorBase
from apportion.platform.weights import SyncReceipt, TensorEntry, WeightBundle


@dataclass
class RolloutSpec:
    engine: str
    engine_spec: EngineSpec
    seed: int
    seed_each_sample: bool  # samples follow from seed, prompt, place and weights version alone; costs a little speed
    episodes: EpisodeSpec | None = None  # with an environment


@dataclass
class RolloutReport:
    seconds: float  # inside the engine
    sampled_tokens: int
    trajectories: int
    environment_seconds: float = 0.0
    environment_failures: int = 0  # episodes without a reward
    first_failure: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)  # the first text of each kind of failure


class RolloutWorker(ActorBase):
    """One rollout engine."""

    def __init__(self, spec: RolloutSpec, name: str) -> None:
        self._spec = spec
        self._name = name
        self._engine = make_engine(spec.engine, spec.engine_spec)
        self._version = 0
        self._given = GivenResponses(spec.engine_spec.model, spec.engine_spec.trust_remote_code)
        self._runner: EpisodeRunner | None = None

    def connect(self, environments: list[Actor], sharing: int) -> None:
        """From now on a prompt is played as an episode of several turns with one of `environments`, each of which at
        most `sharing` engines use."""
        spec = self._spec.episodes
        assert spec is not None
        remote = RemoteEnvironments(environments, self._name, spec.step_timeout_seconds, spec.threads, sharing)
        self._runner = EpisodeRunner(self._engine, remote, spec.encoder(), spec.limits)

    def generate(
        self, prompts: list[Prompt], first_group: int, responses: int, sampling: Sampling
    ) -> tuple[RolloutReport, Batch]:
        """A group of `responses` trajectories for each prompt; group ids count up from `first_group`."""
        progress.begin("engine steps")
        if self._runner is not None:
            return self._play(self._runner, prompts, first_group, responses, sampling)
        requests = [
            Request(prompt.token_ids, self._seed(prompt, index) if self._spec.seed_each_sample else None)
            for prompt in prompts
            for index in range(responses)
        ]
        start = time.perf_counter()
        if sampling.response_column is not None:
            samples = self._given.samples([p for p in prompts for _ in range(responses)], sampling)
        else:
            samples = self._engine.generate(requests, sampling)
        seconds = time.perf_counter() - start
        trajectories = [
            self._trajectory(prompts[place // responses], first_group + place // responses, place % responses, sample)
            for place, sample in enumerate(samples)
        ]
        batch = Batch.from_trajectories(trajectories)
        return RolloutReport(seconds, int(batch.response_lengths.sum()), len(batch)), batch

    def _play(
        self, runner: EpisodeRunner, prompts: list[Prompt], first_group: int, responses: int, sampling: Sampling
    ) -> tuple[RolloutReport, Batch]:
        def sample_seed(prompt: Prompt, index: int, turn: int) -> int | None:
            return self._seed(prompt, f"{index}.{turn}") if self._spec.seed_each_sample else None

        seeds = Seeds(self._version, lambda prompt: self._seed(prompt, "task"), sample_seed)
        trajectories, played = runner.run(prompts, first_group, responses, sampling, seeds)
        report = RolloutReport(
            played.sampling_seconds,
            played.sampled_tokens,
            len(trajectories),
            played.environment_seconds,
            played.failures,
            played.first_failure,
            played.kinds,
        )
        return report, Batch.from_trajectories(trajectories)

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs [L - 1] of each of the L tokens given those before it, by the weights as they are now."""
        return self._engine.score(token_ids)

    def _trajectory(self, prompt: Prompt, group: int, index: int, sample: Sample) -> Trajectory:
        length = len(sample.token_ids)
        return Trajectory(
            prompt_id=prompt.prompt_id,
            group_id=group,
            sample_index=index,
            token_ids=np.concatenate([prompt.token_ids, sample.token_ids]),
            prompt_length=len(prompt.token_ids),
            action_mask=np.ones(length, bool),
            turn_ids=np.zeros(length, np.int32),
            behavior_logprobs=sample.logprobs,
            policy_version=self._version,
            finish_reason=sample.finish_reason,
            text=sample.text,
            terminated=sample.finish_reason == "stop",
        )

    def _seed(self, prompt: Prompt, index: int | str) -> int:
        return seed_of(f"{self._spec.seed}/{prompt.prompt_id}/{index}/{self._version}".encode())

    def load_weights(self, bundle: WeightBundle, check: bool) -> SyncReceipt:
        receipt = self._engine.load(bundle, self._name, check)
        self._version = bundle.version
        return receipt

    def join_channel(self, address: ChannelAddress, first_member: int) -> None:
        """From now on weights may come over this channel; its workers are members from `first_member` on."""
        self._engine.join(address, first_member)

    def receive_weights(self, entries: list[TensorEntry], version: int, check: bool) -> SyncReceipt:
        """As `load_weights`, with the bytes that the trainer broadcasts meanwhile."""
        receipt = self._engine.receive(entries, version, self._name, check)
        self._version = version
        return receipt

    def device_memory(self) -> DeviceMemory | None:
        """Of the engine, whose workers may be processes of their own."""
        return self._engine.device_memory()

    def set_version(self, version: int) -> None:
        self._version = version
