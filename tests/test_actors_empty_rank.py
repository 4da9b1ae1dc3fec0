"""More ranks than groups: a rank without trajectories gets every field that the others have, and updates with nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.engine import OptimizerStep
from apportion.actors.modules import CausalLMLogprobs
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.algorithms import registry
from apportion.algorithms.correction import ImportanceCorrection
from apportion.batch import Batch, Signals

HIDDEN_REWARD = {"name": "hidden_reward", "base": {"name": "rloo"}, "p": 0.5, "tau": -1.0, "correct_at": 1.0}
CLIP = {"name": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "ratio": "token"}
PLAIN = LossSpec(CLIP, 1.0, False, "k3", 0.0, ImportanceCorrection("none"), 0.5, 1)


class Settings:
    micro_batch_tokens = 40
    logits_chunk_tokens = 16
    zero_stage = 0


class Engine:
    """Keeps every loss, that of the pass with nothing included; takes no step."""

    def __init__(self, wrapped):
        self.wrapped, self.device, self.losses, self.passes = wrapped, torch.device("cpu"), [], 0

    def module(self):
        return self.wrapped

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)

    def extra_passes(self, own: int) -> int:
        return 0

    def gather(self, value):
        return [value]

    def train_step(self, micros, empty, loss) -> OptimizerStep:
        self.passes += len(micros)
        self.losses += [float(loss(m).detach()) for m in [*micros, empty]]
        return OptimizerStep(1.0, 0.5)


@pytest.fixture
def policy(tiny) -> PolicyWorker:
    worker = PolicyWorker(PolicySpec("", "float32", "sdpa", False, None, Settings(), PLAIN, 1))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    worker.engine = Engine(CausalLMLogprobs(model, 16))
    worker._surrogate = registry.build("surrogate", CLIP)
    worker._influences = worker._distillation = None
    return worker


def credited_ranks(credited: Batch) -> list[Batch]:
    """One group of two for three ranks, put together as two: through cut, signals and credit."""
    bare = {"advantages": None, "returns": None, "loss_weights": None, "value_weights": None, "minibatch_ids": None}
    bare |= {"old_logprobs": None, "reference_logprobs": None, "values": None}
    scored = replace(credited, **bare, rewards=np.array([1.0, 0.0] * 4)).select([0, 1])
    spec = CreditSpec(HIDDEN_REWARD, {"name": "token_mean"}, [], [], False, "k1", "", keep_groups_together=True)
    worker = CreditWorker(spec)
    _, *shards = worker.cut(1, 3, 1, scored)
    assert [len(s) for s in shards] == [1, 1, 0]

    def signals(shard: Batch) -> Signals:
        tokens = int(shard.response_lengths.sum())
        return Signals(old_logprobs=np.full(tokens, -5.5, np.float32), influences=np.ones(tokens, np.float32))

    _, *out = worker.credit(3, 0.0, 0, *shards, *map(signals, shards))
    return [Batch.concat(out[:2]), out[2]]


def test_a_rank_without_trajectories_has_every_field_that_the_others_have(credited):
    full, empty = credited_ranks(credited)
    known = {name for name, value in vars(full).items() if value is not None}
    assert {name for name, value in vars(empty).items() if value is not None} == known
    assert known >= {"advantages", "loss_weights", "value_weights", "old_logprobs", "influences", "minibatch_ids"}
    assert [len(empty), len(empty.advantages), empty.advantages.dtype] == [0, 0, full.advantages.dtype]
    assert full.advantages.tolist() == pytest.approx([1.5] * 9 + [-0.5] * 3)


def test_a_rank_without_trajectories_updates_with_a_loss_of_zero(policy, credited):
    _, empty = credited_ranks(credited)
    report = policy.update(empty, 1, 0.0)
    assert policy.engine.losses == [0.0] and policy.engine.passes == 0 and report.tokens == 0
    assert set(report.totals.weights.values()) <= {0.0} and set(report.totals.sums.values()) <= {0.0}


def test_ranks_with_and_without_trajectories_sum_to_the_update_of_one_rank(policy, credited):
    full, empty = credited_ranks(credited)
    for shard in (full, empty):
        policy.update(shard, 1, 0.0)
    split = sum(policy.engine.losses)
    policy.engine.losses = []
    policy.update(Batch.concat([full, empty]), 1, 0.0)
    assert split == pytest.approx(sum(policy.engine.losses)) and abs(split) > 1e-3
