"""Does MA-PPO reach PPO's final reward in fewer steps (the paper: 1.7 to 2 times faster)?

The task is that of `words`. Both learn from one reward at the end, with the same critic, KL, clip and rates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.credit.learner import Learner, Settings, recipe, responses, rollout
from benchmarks.credit.model import TinyLM
from benchmarks.credit.protocol import Curve, Outcome, Scale
from benchmarks.credit.words import LIMIT, STOP, Language, start_model

SUPERVISED, STEPS, EVERY = 300, 80, 4
PROMPTS, TIMES = 48, 16
POLICY, CRITIC = Settings(learning_rate=2e-4), Settings(learning_rate=1e-3)
KL = {"place": "reward", "coefficient": 0.01, "estimator": "k1"}
LONGER = round(0.95 ** (1 / 5), 4)  # a lambda that decays over five tokens as 0.95 does over one
ARMS: dict[str, dict[str, Any]] = {
    "PPO": {"n_gram": 1},
    "MA-PPO, 3 tokens": {"n_gram": 3},
    "MA-PPO, 5 tokens": {"n_gram": 5},
    f"PPO, lambda {LONGER}": {"n_gram": 1, "gae_lambda": LONGER},
}


def algorithm_of(arm: str) -> dict[str, Any]:
    return recipe("ma_rlhf", credit=ARMS[arm], kl=KL)


def evaluate(model: TinyLM, language: Language, prompts: Tensor, seed: int) -> dict[str, float]:
    batch = rollout(model, prompts, 1, LIMIT, STOP, torch.Generator().manual_seed(seed))
    return {"reward": float(language.rewards(prompts, responses(batch)).mean())}


def run(seed: int, scale: Scale) -> Outcome:
    language = Language(np.random.default_rng([seed, 0]))
    start = start_model(seed, language, scale.of(SUPERVISED))
    return Outcome({arm: train(start, arm, language, seed, scale) for arm in ARMS})


def train(start: TinyLM, arm: str, language: Language, seed: int, scale: Scale) -> Curve:
    learner = Learner(start, algorithm_of(arm), POLICY, CRITIC)
    random, generator = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed)
    everything, curve = language.all_prompts(TIMES), Curve()
    explained = 0.0
    curve.add(0, evaluate(start, language, everything, seed) | {"explained variance": explained})
    for step in range(1, scale.of(STEPS) + 1):
        prompts = language.draw_prompts(PROMPTS, random)
        batch = rollout(learner.model, prompts, 1, LIMIT, STOP, generator)
        batch.rewards = language.rewards(prompts, responses(batch))
        explained = learner.step(batch).get("critic/explained_variance", 0.0)
        if step % EVERY == 0 or step == scale.of(STEPS):
            measured = evaluate(learner.model, language, everything, seed)
            curve.add(step, measured | {"explained variance": explained})
    return curve
