"""Rollout engines: token ids in, token ids and behaviour log-probs out. One engine a file, found by name here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from apportion.platform.channel import ChannelAddress
from apportion.platform.device_memory import DeviceMemory
from apportion.platform.weights import SyncReceipt, TensorEntry, WeightBundle

ENGINES = {
    "vllm": "apportion.actors.engines.vllm_engine:VllmEngine",
    "transformers": "apportion.actors.engines.transformers_engine:TransformersEngine",
}


@dataclass
class Sampling:
    """How to sample. temperature 0 is greedy (evaluation only)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    response_column: str | None = None  # nothing is sampled: the responses are the prompts' own, of this column


def seed_of(key: bytes) -> int:
    """A sampling seed of 31 bits that follows from `key` alone, in every process."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1


@dataclass
class Request:
    """One response to be sampled."""

    token_ids: np.ndarray  # [L] int32
    seed: int | None = None
    max_tokens: int | None = None  # null: sampling's


@dataclass
class Sample:
    """One sampled response. Log-probs are those of the distribution that was sampled from."""

    token_ids: np.ndarray  # [R] int32
    logprobs: np.ndarray  # [R] float32
    finish_reason: str  # stop, length or abort
    text: str


@dataclass
class EngineSpec:
    """What an engine needs to start."""

    model: str
    dtype: str
    seed: int
    max_model_len: int
    max_sequences: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: float
    compile: bool
    prefix_caching: bool
    trust_remote_code: bool
    threads: int
    first_thread: int
    seeded: bool = False  # requests carry seeds of their own


class RolloutEngine(Protocol):
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]: ...

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs [L - 1] float32 of each of the L tokens given those before it, at temperature 1. Draws no random
        number, and runs every token through the model as it is now."""
        ...

    def load(self, bundle: WeightBundle, name: str, check: bool) -> SyncReceipt:
        """Take new weights, and with `check` prove that the live model holds them."""
        ...

    def device_memory(self) -> DeviceMemory | None:
        """The largest of its workers', since the last call; None without a GPU."""
        ...

    def join(self, address: ChannelAddress, first_member: int) -> None:
        """Make each worker a member of the channel that `receive` takes weights from."""
        ...

    def receive(self, entries: list[TensorEntry], version: int, name: str, check: bool) -> SyncReceipt:
        """As `load`, with the bytes from the channel."""
        ...


def make_engine(name: str, spec: EngineSpec) -> RolloutEngine:
    module, _, attribute = ENGINES[name].partition(":")
    engine: Any = getattr(import_module(module), attribute)
    return engine(spec)
