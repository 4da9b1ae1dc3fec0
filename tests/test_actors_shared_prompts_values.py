"""Values and reference log-probs: those of whole logits, behind one copy of a prompt as in rows of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.actors import reference
from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.microbatch import cut
from apportion.actors.modules import CausalLMLogprobs, ValueModel
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.actors.reference import ReferenceSpec, ReferenceWorker
from apportion.algorithms.correction import ImportanceCorrection
from apportion.algorithms.registry import build
from apportion.batch import Batch, Totals, Trajectory


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def shard():
    """Two groups of three responses, of unlike lengths."""
    rng, rows = np.random.default_rng(0), []
    for group in range(2):
        prompt = rng.integers(0, 61, 5 + group)
        for index in range(3):
            n = 2 + index + group
            ids = np.concatenate([prompt, rng.integers(0, 61, n)]).astype(np.int32)
            rows.append(
                Trajectory(f"p{group}", group, index, ids, len(prompt), np.ones(n, bool), np.zeros(n, np.int32),
                           np.zeros(n, np.float32), 0, "stop", "")
            )  # fmt: skip
    batch = Batch.from_trajectories(rows)
    count = batch.action_tokens
    returns, weights = rng.normal(size=count).astype(np.float32), np.full(count, 1 / count, np.float32)
    return replace(batch, returns=returns, value_weights=weights, values=np.zeros(count, np.float32))


def test_reference_logprobs(model, shard, monkeypatch):
    monkeypatch.setattr(reference, "load_causal_lm", lambda *_: model)
    alone, shared = (
        ReferenceWorker(ReferenceSpec("", "float32", "sdpa", False, 64, 8, 1.0, None, share)).signals(shard)[1]
        for share in (False, True)
    )
    assert (alone.reference_logprobs < -1).all()
    np.testing.assert_allclose(shared.reference_logprobs, alone.reference_logprobs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_reference_logprobs_are_those_of_whole_logits_at_the_sampling_temperature(
    model, shard, monkeypatch, share_prompts
):
    monkeypatch.setattr(reference, "load_causal_lm", lambda *_: model)
    spec = ReferenceSpec("", "float32", "sdpa", False, 32, 8, 0.7, None, share_prompts)
    got = ReferenceWorker(spec).signals(shard)[1].reference_logprobs
    for row in range(len(shard)):
        prompt, ids = int(shard.prompt_lengths[row]), torch.from_numpy(shard.sequence(row).astype(np.int64))
        with torch.no_grad():
            logprobs = (model(ids[None]).logits[0] / 0.7).log_softmax(-1)[prompt - 1 : -1]
        right = logprobs.gather(1, ids[prompt:, None])[:, 0]
        np.testing.assert_allclose(got[shard.response_slice(row)], right, atol=2e-5, rtol=0)


def test_a_policy_that_is_its_reference_has_no_kl_at_any_temperature(model, shard, monkeypatch):
    for parameter in model.parameters():  # distributions far from uniform: another temperature would show
        parameter.data.mul_(6 if parameter.dim() > 1 else 1)
    monkeypatch.setattr(reference, "load_causal_lm", lambda *_: model)
    _, signals = ReferenceWorker(ReferenceSpec("", "float32", "sdpa", False, 64, 8, 0.7, None)).signals(shard)
    loss = LossSpec({"name": "ppo_clip"}, 0.7, True, "k3", 0.0, ImportanceCorrection("none"), 0.5, 1)
    worker = PolicyWorker(PolicySpec("", "float32", "sdpa", False, None, None, loss, 1))
    worker.engine = Engine(CausalLMLogprobs(model, 8))
    worker._surrogate, worker._distillation = build("surrogate", loss.surrogate), None
    batch = replace(signals.apply(shard), advantages=shard.returns, loss_weights=shard.value_weights)
    totals = Totals()
    for micro in cut(batch, np.arange(len(batch)), 64):
        worker._loss(micro, batch, 0.1, totals)
    assert totals.means()["policy/kl_reference"] == pytest.approx(0, abs=1e-7)
    assert totals.weights["policy/kl_reference"] == batch.action_tokens


class Engine:
    def __init__(self, module):
        self.forward, self.device = module, torch.device("cpu")


def test_the_critics_loss_and_gradient(model, shard):
    value_model = ValueModel(model)
    torch.nn.init.normal_(value_model.value_head.weight)
    worker = CriticWorker(CriticSpec("", "float32", "sdpa", False, None, 0.2, 1, 1))
    worker.engine = Engine(value_model)

    def gradients(share):
        value_model.zero_grad()
        totals = Totals()
        for micro in cut(shard, np.arange(len(shard)), 64, share):
            worker._loss(micro, shard, totals).backward()
        return totals.sums["critic/loss"], [p.grad.clone() for p in value_model.parameters() if p.grad is not None]

    loss, alone = gradients(False)
    shared_loss, shared = gradients(True)
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert loss > 0.1
    for got, expected in zip(shared, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
