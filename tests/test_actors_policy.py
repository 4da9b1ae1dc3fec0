"""A policy rank's loss against the formula on whole sequences; which rows are passed; what it reports. No DeepSpeed."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apportion.actors.critic import CriticSpec, CriticWorker, freeze_unused_head
from apportion.actors.engine import OptimizerStep
from apportion.actors.loading import load_causal_lm
from apportion.actors.microbatch import cut, nothing
from apportion.actors.modules import CausalLMLogprobs, ValueModel
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.algorithms import registry
from apportion.algorithms.correction import ImportanceCorrection
from apportion.batch import Totals


@dataclass
class Settings:
    micro_batch_tokens: int = 40
    logits_chunk_tokens: int = 16
    zero_stage: int = 0


OTHER_RANK = torch.tensor([30.0, 10.0], dtype=torch.float64)  # ten weights of another rank that add up to 30


class Engine:
    """Runs passes and keeps every loss; takes no step."""

    def __init__(self, wrapped):
        self.wrapped, self.device, self.losses, self.passes = wrapped, torch.device("cpu"), [], []
        self.others = False

    def module(self):
        return self.wrapped

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)

    def extra_passes(self, own: int) -> int:
        return 2

    def summed(self, tensor):
        return tensor + OTHER_RANK if self.others else tensor

    def train_step(self, micros, empty, loss) -> OptimizerStep:
        self.passes.append([m.packed_index.tolist() for m in micros])
        self.losses.append(sum(loss(m) for m in micros) + 0 * loss(empty))
        return OptimizerStep(1.0, 0.5)


LOSS = LossSpec(
    {"name": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "ratio": "token"},
    0.8, True, "k3", 0.05, ImportanceCorrection(), 0.5, 1,
)  # fmt: skip


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def worker_of(model, loss=LOSS) -> PolicyWorker:
    worker = PolicyWorker(PolicySpec("", "float32", "sdpa", False, None, Settings(), loss, 2))
    worker.engine = Engine(CausalLMLogprobs(model, 16))
    worker._surrogate = registry.build("surrogate", loss.surrogate)
    worker._influences = worker._distillation = None
    return worker


def tokens_of(model, batch):
    """(row, place on the R axis, log-prob, entropy) of every action token, from whole logits of a row at a time."""
    for index in range(len(batch)):
        span, prompt = batch.response_slice(index), int(batch.prompt_lengths[index])
        ids = torch.from_numpy(batch.sequence(index).astype(np.int64))
        log_softmax = (model(ids[None]).logits[0].float() / 0.8).log_softmax(-1)
        for step in np.flatnonzero(batch.action_mask[span]):
            place = prompt + int(step)
            entropy = -(log_softmax[place - 1].exp() * log_softmax[place - 1]).sum()
            yield index, span.start + int(step), log_softmax[place - 1, ids[place]], entropy


def by_hand(model, batch, kl: float) -> list[torch.Tensor]:
    """The loss of each optimiser step, a token at a time from whole logits."""
    steps = [torch.zeros(()), torch.zeros(())]
    for index, packed, now, entropy in tokens_of(model, batch):
        old, behavior = float(batch.old_logprobs[packed]), float(batch.behavior_logprobs[packed])
        advantage, ratio = float(batch.advantages[packed]), torch.exp(now - old)
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = loss * min(np.exp(old - behavior), 2.0)
        gap = float(batch.reference_logprobs[packed]) - now
        loss = loss + kl * (torch.exp(gap) - 1 - gap)
        loss = loss - 0.05 * entropy
        steps[batch.minibatch_ids[index]] = steps[batch.minibatch_ids[index]] + batch.loss_weights[packed] * loss
    return steps


def test_a_score_is_that_of_a_plain_forward_pass_at_temperature_1_with_dropout_off(tiny, model):
    """Though the loss has a temperature of 0.8, and the module was left in training mode by an update."""
    ids = np.array([20, 5, 7, 90, 33, 90, 12, 200, 41], np.int32)
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        right = model(tokens[None]).logits[0].double().log_softmax(-1)[torch.arange(8), tokens[1:]]
    lora = SimpleNamespace(rank=4, alpha=8.0, dropout=0.5, targets=["q_proj", "v_proj"])
    adapted = load_causal_lm(tiny, "float32", lora=lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        moved = adapted.eval()(tokens[None]).logits[0].double().log_softmax(-1)[torch.arange(8), tokens[1:]]
    assert (moved - right).abs().max() > 1e-2
    for which, adapters, expected in ((model, None, right), (adapted, lora, moved)):
        worker = worker_of(which)
        worker.spec.lora = adapters
        worker.engine.module().train()
        before = torch.get_rng_state()
        scores = worker.score(ids)
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5, rtol=0)
        assert scores.dtype == np.float32 and torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in which.parameters())


def test_the_loss_is_the_weighted_sum_over_tokens_and_its_gradient_reaches_every_weight(model, credited):
    worker = worker_of(model)
    report = worker.update(credited, 2, 0.3)
    right = by_hand(model, credited, 0.3)
    assert [float(x) for x in worker.engine.losses] == pytest.approx([float(x) for x in right], rel=1e-4, abs=1e-5)
    gradients = []
    for losses in (worker.engine.losses, right):
        model.zero_grad()
        sum(losses).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=2e-5, rtol=1e-3, msg=name)
    assert [s.learning_rate for s in report.steps] == [0.5, 0.5]
    assert report.tokens == credited.tokens


def test_a_straight_through_kl_has_the_value_of_its_estimator_and_the_gradient_of_k2(model, credited):
    """Beside a surrogate without advantages; the reference is 0.1 away from the policy, so that no estimate is cut."""
    bare = replace(LOSS, entropy_coefficient=0.0, correction=ImportanceCorrection("none"))
    now = worker_of(model).signals(credited)[1].old_logprobs
    shifted = (now + np.where(credited.action_mask, 0.1, 0)).astype(np.float32)
    batch = replace(credited, advantages=np.zeros_like(now), reference_logprobs=shifted)
    values, gradients = {}, {}
    for name, estimator, through in (("k2", "k2", False), ("k3", "k3", False), ("k3+", "k3", True)):
        worker = worker_of(model, replace(bare, kl_estimator=estimator, kl_straight_through=through))
        worker.update(batch, 2, 0.3)
        values[name] = [float(loss) for loss in worker.engine.losses]
        model.zero_grad()
        sum(worker.engine.losses).backward()
        gradients[name] = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert values["k3"] == pytest.approx([0.3 * (np.exp(0.1) - 1.1)] * 2, rel=1e-2)
    assert values["k3+"] == pytest.approx(values["k3"], rel=1e-6)
    for name, gradient in gradients["k2"].items():
        torch.testing.assert_close(gradients["k3+"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    difference = max(float((gradients["k3"][n] - g).abs().max()) for n, g in gradients["k2"].items())
    assert difference > 1e-5


def test_what_is_reported_are_means_over_the_batchs_action_tokens(model, credited):
    report = worker_of(model).update(credited, 2, 0.3)
    mask = credited.action_mask
    means = report.totals.means()
    assert report.totals.weights["policy/entropy"] == mask.sum()
    difference = (credited.old_logprobs - credited.behavior_logprobs)[mask]
    assert means["mismatch/abs_logprob_diff"] == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    assert means["mismatch/kl"] == pytest.approx(-difference.mean(), rel=1e-5)
    assert means["mismatch/max"] == pytest.approx(np.abs(difference).max(), rel=1e-5)
    assert means["mismatch/share_beyond_bound"] == pytest.approx((np.abs(difference) > 0.5).mean())
    assert means["mismatch/correction_mean"] == pytest.approx(np.minimum(np.exp(difference), 2.0).mean(), rel=1e-5)
    assert means["mismatch/share_corrected"] == pytest.approx((np.exp(difference) >= 2.0).mean(), abs=1e-9)
    losses = [float(loss) for loss in by_hand(model, credited, 0.3)]
    assert report.totals.sums["policy/loss"] == pytest.approx(sum(losses), rel=1e-4)


@pytest.fixture
def close(credited):
    """Log-probs of the engine near the trainer's, so that the weights differ from token to token."""
    gaps = np.random.default_rng(5).normal(0.2, 0.6, len(credited.action_mask))
    return replace(credited, behavior_logprobs=(credited.old_logprobs - gaps).astype(np.float32))


@pytest.mark.parametrize("micro_batch_tokens", [25, 1000])
@pytest.mark.parametrize("others", [False, True])
def test_importance_weights_are_normalized_over_the_optimizer_step_however_it_is_cut(
    model, close, micro_batch_tokens, others
):
    correction = ImportanceCorrection("truncate", "token", cap=1.5, floor=0.5, normalize=True)
    loss = replace(LOSS, kl_in_loss=False, entropy_coefficient=0.0, correction=correction)
    plain = worker_of(model, replace(loss, correction=replace(correction, normalize=False)))
    plain.update(close, 2, 0.0)
    worker = worker_of(model, loss)
    worker.engine.others = others
    worker.spec = replace(worker.spec, settings=Settings(micro_batch_tokens))
    means = worker.update(close, 2, 0.0).totals.means()
    assert (len(worker.engine.passes[0]) == 1) == (micro_batch_tokens == 1000)
    of_token = np.repeat(close.minibatch_ids, close.response_lengths)
    weights = np.exp(close.old_logprobs - close.behavior_logprobs).clip(0.5, 1.5)
    for step in (0, 1):
        own = weights[close.action_mask & (of_token == step)]
        mean = (own.sum() + 30) / (len(own) + 10) if others else own.mean()
        expected = float(plain.engine.losses[step]) / mean
        assert float(worker.engine.losses[step]) == pytest.approx(expected, rel=1e-4)
    assert means["mismatch/correction_mean"] == pytest.approx(weights[close.action_mask].mean(), rel=1e-5)
    changed = ((weights == 0.5) | (weights == 1.5))[close.action_mask]
    assert 0.2 < changed.mean() == pytest.approx(means["mismatch/share_corrected"], abs=1e-6)


def test_normalizing_needs_the_log_probs_of_before_the_update(model, credited):
    worker = worker_of(model, replace(LOSS, correction=ImportanceCorrection(normalize=True)))
    with pytest.raises(ValueError, match="old_logprobs: missing in the shard"):
        worker.update(replace(credited, old_logprobs=None), 2, 0.0)


def test_what_is_reported_of_ratios_and_entropies_is_that_of_whole_logits(model, credited):
    means = worker_of(model).update(credited, 2, 0.3).totals.means()
    with torch.no_grad():
        _, places, now, entropies = zip(*tokens_of(model, credited), strict=True)
    gaps = np.array(now) - credited.old_logprobs[list(places)]
    ratios, advantages = np.exp(gaps), credited.advantages[list(places)]
    clipped = ((ratios > 1.2) & (advantages > 0)) | ((ratios < 0.8) & (advantages < 0))
    assert 0.1 < clipped.mean() < 0.9 and (clipped != ((ratios > 1.2) | (ratios < 0.8))).any()
    assert means["policy/clip_fraction"] == pytest.approx(clipped.mean(), rel=1e-6)
    assert means["policy/entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert means["policy/ratio_mean"] == pytest.approx(ratios.mean(), rel=1e-4)
    assert means["policy/ratio_max"] == pytest.approx(ratios.max(), rel=1e-4)
    assert means["policy/approx_kl"] == pytest.approx((ratios - 1 - gaps).mean(), rel=1e-3)


def test_without_a_pass_of_their_own_old_log_probs_are_those_of_the_update(model, credited):
    loss = replace(LOSS, kl_in_loss=False, entropy_coefficient=0.0, correction=ImportanceCorrection("none"))
    worker = worker_of(model, loss)
    report = worker.update(replace(credited, old_logprobs=None), 2, 0.0)
    assert report.totals.means()["policy/ratio_mean"] == 1.0
    expected = -float((credited.loss_weights * credited.advantages).sum())
    assert float(sum(worker.engine.losses)) == pytest.approx(expected, rel=1e-5)


def test_rows_whose_credit_is_zero_are_not_passed_unless_something_else_is_in_the_loss(model, credited):
    idle = replace(credited, advantages=credited.advantages.copy())
    for row in (0, 3):
        idle.advantages[idle.response_slice(row)] = 0
    bare = replace(LOSS, kl_in_loss=False, entropy_coefficient=0.0)
    assert worker_of(model, bare)._teaching(idle).tolist() == [False, True, True, False, True, True, True, True]
    for loss in (replace(bare, kl_in_loss=True), replace(bare, entropy_coefficient=0.1)):
        assert worker_of(model, loss)._teaching(idle).all()
    worker = worker_of(model, bare)
    report = worker.update(idle, 2, 0.0)
    assert report.tokens == idle.tokens - 13 - 12
    passed = {i for step in worker.engine.passes for micro in step for i in micro}
    assert passed.isdisjoint(range(*credited.response_slice(0).indices(1000)))


def test_a_batch_without_any_credit_makes_no_pass_and_a_loss_of_zero(model, credited):
    bare = replace(LOSS, kl_in_loss=False, entropy_coefficient=0.0)
    worker = worker_of(model, bare)
    report = worker.update(replace(credited, advantages=np.zeros_like(credited.advantages)), 2, 0.0)
    assert worker.engine.passes == [[], []]
    assert [float(loss) for loss in worker.engine.losses] == [0.0, 0.0]
    assert {name.partition("/")[0] for name in report.totals.sums} == {"mismatch"}


def test_a_batch_without_any_credit_still_says_how_far_the_engine_is_from_the_trainer(model, credited):
    """By the old log-probs where they are known, else by those of one micro-batch: here rows 2 and 0, the longest."""
    bare = replace(LOSS, kl_in_loss=False, entropy_coefficient=0.0)
    idle = replace(credited, advantages=np.zeros_like(credited.advantages))
    means = worker_of(model, bare).update(idle, 2, 0.0).totals.means()
    difference = (credited.old_logprobs - credited.behavior_logprobs)[credited.action_mask]
    assert means["mismatch/abs_logprob_diff"] == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    assert means["mismatch/max"] == pytest.approx(np.abs(difference).max(), rel=1e-5)

    worker = worker_of(model, bare)
    now = worker.signals(credited)[1].old_logprobs
    totals = worker.update(replace(idle, old_logprobs=None), 2, 0.0).totals
    first = np.concatenate([(now - credited.behavior_logprobs)[credited.response_slice(row)] for row in (0, 2)])
    assert totals.weights["mismatch/kl"] == 21 and worker.engine.passes == [[], []]
    assert totals.means()["mismatch/kl"] == pytest.approx(-first.mean(), abs=1e-4)
    assert totals.maxima["mismatch/max"] == pytest.approx(np.abs(first).max(), abs=1e-4)


def test_idle_passes_count_for_nothing(model, credited):
    worker, totals = worker_of(model), Totals()
    loss = worker._loss(nothing(), credited, 0.1, totals)
    assert float(loss) == 0.0
    assert loss.requires_grad
    assert totals == Totals()


def test_signals_are_the_log_probs_at_the_sampling_temperature_and_zero_for_the_environments_tokens(model, credited):
    _, signals = worker_of(model).signals(credited)
    index = 5
    ids = torch.from_numpy(credited.sequence(index).astype(np.int64))
    with torch.no_grad():
        right = (model(ids[None]).logits[0].float() / 0.8).log_softmax(-1)[2:-1].gather(1, ids[3:, None])[:, 0]
    span = credited.response_slice(index)
    mask = credited.action_mask[span]
    np.testing.assert_allclose(signals.old_logprobs[span][mask], right[torch.from_numpy(mask)], atol=2e-5)
    assert not signals.old_logprobs[span][~mask].any()
    assert (signals.entropies[credited.action_mask] > 0).all()


def test_an_update_without_credit_says_what_is_missing(model, credited):
    with pytest.raises(ValueError, match="advantages: missing in the shard, expected it to be made before the update"):
        worker_of(model, replace(LOSS, kl_in_loss=False)).update(replace(credited, advantages=None), 2, 0.0)


@pytest.mark.parametrize("value_clip", [0.2, None])
def test_a_critics_loss_is_the_larger_of_two_squared_errors(model, credited, value_clip):
    worker = CriticWorker(CriticSpec("", "float32", "sdpa", False, Settings(), value_clip, 1, 1))
    values = ValueModel(model)
    with torch.no_grad():
        values.value_head.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    worker.engine = Engine(values)
    expected, totals = 0.0, Totals()
    for micro in cut(credited, np.arange(len(credited)), 40):
        loss = worker._loss(micro, credited, totals)
        with torch.no_grad():
            now = values(micro.input_ids, micro.rows, micro.columns).numpy()
        at = micro.packed_index
        errors = (now - credited.returns[at]) ** 2
        if value_clip is not None:
            old = credited.values[at]
            errors = np.maximum(errors, (np.clip(now, old - value_clip, old + value_clip) - credited.returns[at]) ** 2)
        right = 0.5 * (errors * credited.value_weights[at]).sum()
        assert float(loss) == pytest.approx(right, rel=1e-5)
        expected += right
    assert totals.sums["critic/loss"] == pytest.approx(expected, rel=1e-5)
    assert float(worker._loss(nothing(), credited, totals)) == 0.0


def test_values_are_of_the_state_before_each_action_token_and_the_bootstrap_of_the_last_state(model, credited):
    worker = CriticWorker(CriticSpec("", "float32", "sdpa", False, Settings(), None, 1, 1))
    values = ValueModel(model)
    with torch.no_grad():
        values.value_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    worker.engine = Engine(values)
    _, signals = worker.signals(credited)
    assert len(set(np.round(signals.bootstrap_values, 3).tolist())) == len(credited)
    for row in range(len(credited)):
        span, prompt = credited.response_slice(row), int(credited.prompt_lengths[row])
        with torch.no_grad():
            ids = torch.from_numpy(credited.sequence(row).astype(np.int64))
            states = (model.model(ids[None]).last_hidden_state[0] @ values.value_head.weight[0]).numpy()
        mask = credited.action_mask[span]
        right = np.where(mask, states[prompt - 1 : -1], 0.0)
        np.testing.assert_allclose(signals.values[span], right, atol=1e-4, rtol=0)
        assert np.abs(right[mask]).min() > 1e-3
        assert signals.bootstrap_values[row] == pytest.approx(states[-1], abs=1e-4)


def test_an_output_head_that_nothing_trains_is_frozen_but_a_tied_one_is_not(model):
    values = ValueModel(model)
    freeze_unused_head(values)
    assert all(p.requires_grad for p in values.parameters())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    freeze_unused_head(values)
    assert [n for n, p in values.named_parameters() if not p.requires_grad] == ["model.lm_head.weight"]


def test_the_kl_that_is_shown_is_k3_whatever_the_loss_is_made_of(model, credited):
    def means(estimator: str) -> dict[str, float]:
        loss = replace(LOSS, kl_estimator=estimator, entropy_coefficient=0.0)
        return worker_of(model, loss).update(credited, 2, 0.3).totals.means()

    k3, k1 = means("k3"), means("k1")
    assert k3["policy/kl_reference"] > 0
    assert k1["policy/kl_reference"] == pytest.approx(k3["policy/kl_reference"], rel=1e-6)
