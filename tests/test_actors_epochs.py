"""Several passes over one batch: each is cut into the same optimiser steps, by the policy and by the critic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.engine import OptimizerStep
from apportion.actors.modules import CausalLMLogprobs, ValueModel
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.algorithms import registry
from apportion.algorithms.correction import ImportanceCorrection

CLIP = {"name": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "ratio": "token"}
SETTINGS = SimpleNamespace(micro_batch_tokens=40, logits_chunk_tokens=16, zero_stage=0)


class Engine:
    """Keeps which tokens each optimiser step had and its loss, and names the steps 1, 2, ... by their learning rate."""

    def __init__(self, wrapped):
        self.wrapped, self.device, self.steps, self.losses = wrapped, torch.device("cpu"), [], []

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)

    def train_step(self, micros, empty, loss) -> OptimizerStep:
        self.steps.append(sorted(i for m in micros for i in m.packed_index.tolist()))
        self.losses.append(float(sum(loss(m) for m in micros).detach()))
        return OptimizerStep(1.0, float(len(self.steps)))


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def policy(model, epochs):
    loss = LossSpec(CLIP, 1.0, False, "k3", 0.0, ImportanceCorrection("none"), 0.5, epochs)
    worker = PolicyWorker(PolicySpec("", "float32", "sdpa", False, None, SETTINGS, loss, 4))
    worker.engine = Engine(CausalLMLogprobs(model, 16))
    worker._surrogate = registry.build("surrogate", CLIP)
    worker._influences = worker._distillation = None
    return worker, lambda batch: worker.update(batch, 2, 0.0)


def critic(model, epochs):
    worker = CriticWorker(CriticSpec("", "float32", "sdpa", False, SETTINGS, 0.2, epochs, 4))
    worker.engine = Engine(ValueModel(model))
    return worker, lambda batch: worker.update(batch, 2)


@pytest.mark.parametrize(("role", "loss"), [(policy, "policy/loss"), (critic, "critic/loss")])
def test_two_epochs_repeat_the_optimiser_steps_of_one(model, credited, role, loss):
    once, update = role(model, 1)
    first = update(credited)
    worker, update = role(model, 2)
    report = update(credited)
    step_of_token = np.repeat(credited.minibatch_ids, credited.response_lengths)
    expected = [np.flatnonzero(credited.action_mask & (step_of_token == step)).tolist() for step in (0, 1)]
    assert once.engine.steps == expected and worker.engine.steps == expected * 2
    assert worker.engine.losses == pytest.approx(once.engine.losses * 2, rel=1e-6)
    assert [step.learning_rate for step in report.steps] == [1.0, 2.0, 3.0, 4.0]
    assert (first.tokens, report.tokens) == (credited.tokens, 2 * credited.tokens)
    assert report.totals.sums[loss] == pytest.approx(2 * first.totals.sums[loss], rel=1e-6)
