"""A rank that resumes draws the dropout that it would have drawn: the policy, the critic, a preference stage."""

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from apportion.actors import critic, policy, preference
from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.engine import OptimizerStep, World
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.actors.preference import PreferenceSpec, PreferenceWorker, StepShare
from apportion.algorithms.correction import ImportanceCorrection
from apportion.algorithms.preference import RewardModel
from apportion.conf.schema import LoraConfig
from apportion.data.pair_tokens import PreferenceData


@dataclass
class Settings:
    micro_batch_tokens: int = 40
    logits_chunk_tokens: int = 64
    gradient_checkpointing: bool = False
    zero_stage: int = 0


class PlainEngine:
    """Plain gradient descent in place of DeepSpeed; like it, it seeds what joins and trains in train mode."""

    device = torch.device("cpu")

    def __init__(self, module, settings, world, total_steps):
        torch.manual_seed(world.seed)
        self._module, self.forward = module, module

    def module(self):
        return self._module

    def named_weights(self):
        return ((name, parameter.detach()) for name, parameter in self._module.named_parameters())

    def train_step(self, micro_batches, empty, loss):
        self._module.train()
        self._module.zero_grad()
        for part in micro_batches:
            loss(part).backward()
        with torch.no_grad():
            for parameter in self._module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        return OptimizerStep(0.0, 0.1)

    def save(self, folder):
        folder.mkdir(parents=True)
        torch.save(self._module.state_dict(), folder / "weights.pt")

    def load(self, folder):
        self._module.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))


LORA = LoraConfig(rank=2, dropout=0.5)
PLAIN = LossSpec({"name": "ppo_clip"}, 1.0, False, "k3", 0.0, ImportanceCorrection("none"), 0.5, 1)


@pytest.fixture
def rank(request, tiny, credited, tmp_path, monkeypatch):
    """(make a rank, one update of it), by the name of its role."""
    for module in (policy, critic, preference):
        monkeypatch.setattr(module, "DeepSpeedEngine", PlainEngine)
    kind = request.param
    if kind == "policy":
        spec = PolicySpec(tiny, "float32", "eager", False, LORA, Settings(), PLAIN, 4)
        batch = replace(credited, advantages=10 * credited.advantages)
        return lambda: PolicyWorker(spec), lambda worker: worker.update(batch, 1, 0.0)
    if kind == "critic":
        dropping = tmp_path / "dropping"
        shutil.copytree(tiny, dropping)
        config = json.loads((dropping / "config.json").read_text())
        (dropping / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
        spec = CriticSpec(str(dropping), "float32", "eager", False, Settings(), None, 1, 4)
        return lambda: CriticWorker(spec), lambda worker: worker.update(credited, 1)
    spec = PreferenceSpec(tiny, "float32", "eager", False, LORA, Settings(), RewardModel(), None, 4, 0)
    data = PreferenceData(credited, True, None)
    share = StepShare(np.arange(4), np.full(4, 0.25, np.float32))

    def made():
        worker = PreferenceWorker(spec)
        worker.load_data(data, None)
        return worker

    return made, lambda worker: worker.update(share)


def weights_of(worker):
    return torch.cat([weight.flatten() for _, weight in worker.engine.named_weights()])


@pytest.mark.parametrize("rank", ["policy", "critic", "preference"], indirect=True)
def test_a_resumed_rank_draws_the_dropout_it_would_have_drawn(rank, tmp_path):
    make, update = rank
    worlds = World(seed=3), World(seed=3)
    first = make()
    first.setup(worlds[0])
    update(first)
    first.save(str(tmp_path / "saved"))
    saved = weights_of(first)
    update(first)
    again = make()
    again.setup(worlds[1])
    again.load(str(tmp_path / "saved"))
    assert torch.equal(weights_of(again), saved)
    update(again)
    assert torch.equal(weights_of(again), weights_of(first))
    other = make()
    other.setup(worlds[1])
    other.load(str(tmp_path / "saved"))
    torch.manual_seed(17)  # the comparison sees it where anything else is drawn
    update(other)
    assert not torch.equal(weights_of(other), weights_of(first))
