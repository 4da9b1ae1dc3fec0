"""The workloads: the configuration they are taken from, and batches of made-up trajectories."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

RESPONSES = 64
GROUP = 8


def rounds_or(default: int) -> int:
    """Measurements of each side; BENCH_ROUNDS=1 for a first look."""
    return int(os.environ.get("BENCH_ROUNDS", default))


def composed(*overrides: str) -> Any:
    """The typed configuration of the quickstart recipe with `overrides`."""
    from apportion.cli import compose_config, to_config

    config, _ = to_config(compose_config(["experiment=quickstart", *overrides]))
    return config


def encoder(model: str) -> Any:
    from apportion.data.prompts import PromptEncoder, load_tokenizer

    return PromptEncoder(load_tokenizer(model, None, False), None, True, {}, 128)


def made_up_batch(
    prompt_tokens: int, least: int, most: int, responses: int = RESPONSES, seed: int = 0, vocabulary: int = 49000
) -> Any:
    """Credited trajectories [responses], groups of 8 behind one prompt, no advantage of 0 (rows without any credit are
    left out of an update, which a bare loop would not do)."""
    from apportion.batch import Batch, Trajectory

    rng = np.random.default_rng(seed)
    trajectories = []
    for index in range(responses):
        group = index // GROUP
        prompt = np.random.default_rng((seed, group)).integers(5, vocabulary, prompt_tokens)
        length = int(rng.integers(least, most + 1))
        response = rng.integers(5, vocabulary, length)
        trajectories.append(
            Trajectory(
                f"p{group}", group, index % GROUP, np.concatenate([prompt, response]).astype(np.int32), prompt_tokens,
                np.ones(length, bool), np.zeros(length, np.int32), rng.normal(-2, 0.1, length).astype(np.float32),
                0, "stop", "",
            )
        )  # fmt: skip
    batch = Batch.from_trajectories(trajectories)
    tokens = int(batch.response_lengths.sum())
    sign = np.where(np.arange(responses) % 2, 1.0, -1.0).repeat(batch.response_lengths)
    batch.rewards = (np.arange(responses) % 2).astype(np.float64)
    batch.sample_mask = np.ones(responses, bool)
    batch.advantages = sign.astype(np.float32)
    batch.loss_weights = np.full(tokens, 1 / tokens, np.float32)
    batch.minibatch_ids = np.zeros(responses, np.int32)
    return batch
