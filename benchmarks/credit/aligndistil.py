"""Does AlignDistil beat DPO and RLHF at the same number of samples?

The task is that of `words`; preferences are drawn from the true reward by Bradley and Terry's model. Everything is made
from the same pairs: DPO, its reverse and a reward model by the preference stage's own worker.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apportion.actors.modules import CausalLMLogprobs
from apportion.actors.preference import PreferenceSpec, PreferenceWorker, StepShare
from apportion.actors.score_model import ScoreModel
from apportion.algorithms.preference import Dpo, Objective, RewardModel
from apportion.batch import Batch
from apportion.data.pair_tokens import PreferenceData
from benchmarks.credit.learner import Learner, PlainEngine, Settings, recipe, response_logprobs, responses, rollout
from benchmarks.credit.model import TinyLM
from benchmarks.credit.protocol import Curve, Outcome, Scale
from benchmarks.credit.words import LIMIT, STOP, Language, start_model

SUPERVISED, PAIRS, EPOCHS, PAIR_BATCH = 250, 512, 2, 32
STEPS, EVERY, SAMPLES, TIMES = 40, 4, 48, 12
SHARPNESS = 4.0  # of the preferences: their log-odds are so many times the difference of rewards
BETA = 0.1  # of the teachers
PREFERENCE, POLICY, CRITIC = Settings(3e-4), Settings(3e-4), Settings(1e-3)
LAST = 3  # places whose mean is the end


class Preference(PreferenceWorker):
    """A rank of the preference stage on a copy of a model that is in memory."""

    def __init__(self, start: TinyLM, objective: Objective, data: PreferenceData, seed: int) -> None:
        super().__init__(PreferenceSpec("", "float32", "sdpa", False, None, PREFERENCE, objective, None, 1, seed))
        self.model = deepcopy(start)
        if isinstance(objective, RewardModel):
            self.model.score = nn.Linear(start.config.hidden_size, 1, bias=False)
            self.model.lm_head.weight.requires_grad_(False)
            nn.init.normal_(self.model.score.weight, std=1 / (start.config.hidden_size + 1) ** 0.5)
        module = ScoreModel(self.model) if isinstance(objective, RewardModel) else CausalLMLogprobs(self.model, 2**16)
        self.engine: Any = PlainEngine(module, PREFERENCE)
        self.load_data(data, None)
        if objective.needs_reference:
            self.set_reference(self.reference_logprobs(np.arange(len(data)), np.arange(0))[1])

    def take(self, examples: np.ndarray) -> None:
        """One optimiser step on these pairs."""
        self.update(StepShare(examples, np.full(len(examples), 1 / len(examples), np.float32)))

    def scores(self, batch: Batch) -> np.ndarray:
        """[b] of a reward model."""
        rows = PreferenceData(batch, pairs=False)
        return self._answer_sums(self.engine.forward, rows, np.arange(len(batch))).astype(np.float64)


def draw_pairs(start: TinyLM, language: Language, count: int, seed: int) -> PreferenceData:
    """Two responses to each of `count` prompts, the chosen one first."""
    random, generator = np.random.default_rng([seed, 4]), torch.Generator().manual_seed(seed + 1000)
    prompts = language.draw_prompts(count, random)
    batch = rollout(start, prompts, 2, LIMIT, STOP, generator)
    rewards = language.rewards(prompts, responses(batch)).reshape(count, 2)
    first = random.random(count) < 1 / (1 + np.exp(-SHARPNESS * (rewards[:, 0] - rewards[:, 1])))
    places = 2 * np.arange(count)[:, None] + np.where(first[:, None], [0, 1], [1, 0])
    return PreferenceData(batch.select(places.reshape(-1)), pairs=True)


def taught(worker: Preference, steps: int, batch: int, random: np.random.Generator) -> Preference:
    """So many steps over the pairs, in an order drawn anew for each pass."""
    order = np.zeros(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = np.concatenate([order, random.permutation(len(worker.train))])
        worker.take(order[:batch])
        order = order[batch:]
    return worker


def evaluate(model: TinyLM, start: TinyLM, language: Language, seed: int) -> dict[str, float]:
    """True reward, and the distance from the model that everything starts from, nats a response."""
    prompts = language.all_prompts(TIMES)
    batch = rollout(model, prompts, 1, LIMIT, STOP, torch.Generator().manual_seed(seed))
    gaps = batch.behavior_logprobs - response_logprobs(start, batch)
    return {"reward": float(language.rewards(prompts, responses(batch)).mean()), "KL": float(gaps.sum()) / len(batch)}


def run(seed: int, scale: Scale) -> Outcome:
    language = Language(np.random.default_rng([seed, 0]))
    start = start_model(seed, language, scale.of(SUPERVISED))
    pairs = draw_pairs(start, language, scale.of(PAIRS), seed)
    random = np.random.default_rng([seed, 5])
    batch, steps = min(PAIR_BATCH, len(pairs)), scale.of(EPOCHS * PAIRS // PAIR_BATCH)

    def stage(objective: Objective) -> Preference:
        torch.manual_seed(seed)
        return taught(Preference(start, objective, pairs, seed), steps, batch, np.random.default_rng([seed, 6]))

    dpo, low, reverse = (stage(Dpo(beta=b, reverse=r)) for b, r in ((BETA, False), (BETA / 5, False), (BETA, True)))
    judge = stage(RewardModel())
    teachers = [deepcopy(dpo.model), reverse.model]
    curves = {
        f"DPO, beta {BETA}": go_on(dpo, start, language, seed, scale, random),
        f"DPO, beta {BETA / 5}": go_on(low, start, language, seed, scale, random),
    }
    for coefficient in (BETA, BETA / 5):
        kl = {"place": "reward", "coefficient": coefficient, "estimator": "k1"}
        learner = Learner(start, recipe("ppo", kl=kl), POLICY, CRITIC)
        curves[f"RLHF, KL {coefficient}"] = practise(learner, language, judge, seed, scale)
    learner = Learner(start, recipe("aligndistil"), POLICY, teachers=teachers)
    curves["AlignDistil"] = practise(learner, language, None, seed, scale)
    return Outcome(curves)


def go_on(
    worker: Preference, start: TinyLM, language: Language, seed: int, scale: Scale, random: np.random.Generator
) -> Curve:
    """DPO goes on over its pairs, as many responses a step as the others sample."""
    curve, batch = Curve(), min(SAMPLES // 2, len(worker.train))
    curve.add(0, evaluate(worker.model, start, language, seed))
    for step in range(1, scale.of(STEPS) + 1):
        taught(worker, 1, batch, random)
        if step % EVERY == 0 or step == scale.of(STEPS):
            curve.add(step * SAMPLES, evaluate(worker.model, start, language, seed))
    return curve


def practise(learner: Learner, language: Language, judge: Preference | None, seed: int, scale: Scale) -> Curve:
    """On-policy: RLHF is rewarded by the reward model; a distillation has its teachers (rewards are not read)."""
    random, generator, curve = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed), Curve()
    curve.add(0, evaluate(learner.model, learner.start, language, seed))
    for step in range(1, scale.of(STEPS) + 1):
        prompts: Tensor = language.draw_prompts(SAMPLES, random)
        batch = rollout(learner.model, prompts, 1, LIMIT, STOP, generator)
        rewards = np.zeros(len(batch)) if judge is None else judge.scores(batch)
        learner.step(replace(batch, rewards=rewards))
        if step % EVERY == 0 or step == scale.of(STEPS):
            curve.add(step * SAMPLES, evaluate(learner.model, learner.start, language, seed))
    return curve
