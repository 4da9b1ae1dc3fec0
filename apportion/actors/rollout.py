"""Samples responses: a plain class around an engine, run as a Ray actor. Token ids in, packed Batch out."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import numpy as np

from apportion.actors.engines import EngineSpec, Request, Sample, Sampling, make_engine
from apportion.batch import Batch, Prompt, Trajectory
from apportion.platform.process import ActorBase
from apportion.platform.weights import SyncReceipt, WeightBundle


@dataclass
class RolloutSpec:
    engine: str
    engine_spec: EngineSpec
    seed: int
    seed_each_sample: bool  # samples follow from seed, prompt, place and weights version alone; costs a little speed


@dataclass
class RolloutReport:
    seconds: float  # inside the engine
    response_tokens: int
    trajectories: int


class RolloutWorker(ActorBase):
    """One rollout engine."""

    def __init__(self, spec: RolloutSpec, name: str) -> None:
        self._spec = spec
        self._name = name
        self._engine = make_engine(spec.engine, spec.engine_spec)
        self._version = 0

    def generate(
        self, prompts: list[Prompt], first_group: int, responses: int, sampling: Sampling
    ) -> tuple[RolloutReport, Batch]:
        """A group of `responses` trajectories for each prompt; group ids count up from `first_group`."""
        requests = [
            Request(prompt.token_ids, self._seed(prompt, index) if self._spec.seed_each_sample else None)
            for prompt in prompts
            for index in range(responses)
        ]
        start = time.perf_counter()
        samples = self._engine.generate(requests, sampling)
        seconds = time.perf_counter() - start
        trajectories = [
            self._trajectory(prompts[place // responses], first_group + place // responses, place % responses, sample)
            for place, sample in enumerate(samples)
        ]
        batch = Batch.from_trajectories(trajectories)
        return RolloutReport(seconds, int(batch.response_lengths.sum()), len(batch)), batch

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

    def _seed(self, prompt: Prompt, index: int) -> int:
        key = f"{self._spec.seed}/{prompt.prompt_id}/{index}/{self._version}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1

    def load_weights(self, bundle: WeightBundle, check: bool) -> SyncReceipt:
        receipt = self._engine.load(bundle, self._name, check)
        self._version = bundle.version
        return receipt

    def set_version(self, version: int) -> None:
        self._version = version
