"""Every credit method alone, reweighted by hidden reward, and on macro actions, with an outcome and with dense rewards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from credit_parts import batch_of

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.algorithms.registry import CREDIT
from apportion.batch import Batch
from apportion.conf.parts import kl_level, pooled_unit, units_of_one_advantage

ALONE = {name: {"name": name} for name in CREDIT}
ALONE["hidden_reward"] |= {"correct_at": 0.5}  # dense rewards add up to anything
HIDDEN = {"name": "hidden_reward", "correct_at": 0.5, "p": 0.5}
WRAPPED = {
    "plain": lambda spec: spec,
    "under hidden_reward": lambda spec: {**HIDDEN, "base": spec},
    "under macro_actions": lambda spec: {"name": "macro_actions", "n_gram": 2, "estimator": spec},
}
# What a method makes of dense rewards: their sum, or each where it stands.
READS_SUMS = ["grpo", "rloo", "capo", "hidden_reward", "none"]
READS_TOKENS = ["gae", "reinforce_pp", "macro_actions", "poad"]

OTHERWISE = {
    "poad on actions": {"name": "poad", "level": "action"},
    "reinforce_pp of groups": {"name": "reinforce_pp", "baseline": "group"},
    "one action": {"name": "macro_actions", "termination": "one"},
}
WITH_UNITS = ["grpo", "rloo", "none", "macro_actions", *OTHERWISE]

every_name = pytest.mark.parametrize("name", CREDIT)
every_wrap = pytest.mark.parametrize("wrap", WRAPPED)


def credited(spec: dict, batch: Batch) -> Batch:
    """Credit without a KL."""
    worker = CreditWorker(CreditSpec(spec, {"name": "token_mean"}, [], [], False, "k1", ""))
    return worker.assign(replace(batch, minibatch_ids=np.zeros(len(batch), np.int32)), 0.0)[0]


def placed(batch: Batch, shares: dict[int, float]) -> Batch:
    """Each row's reward as dense ones: so much of it at its first (0) and last (-1) action token."""
    dense = np.zeros(len(batch.action_mask), np.float32)
    for row in range(len(batch)):
        places = np.flatnonzero(batch.action_mask[batch.response_slice(row)]) + batch.response_offsets[row]
        for place, share in shares.items():
            if len(places):
                dense[places[place]] += share * batch.rewards[row]
    return replace(batch, token_rewards=dense)


def rewarded(kind: str, seed: int = 0) -> Batch:
    batch = batch_of(seed)
    if kind == "outcome":
        return batch
    dense = np.where(batch.action_mask, np.random.default_rng(seed).normal(size=len(batch.action_mask)), 0.0)
    return batch.with_token_rewards([dense[batch.response_slice(row)] for row in range(len(batch))])


def assert_same(got: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(got.advantages, expected.advantages)
    assert (got.returns is None) == (expected.returns is None)
    if got.returns is not None:
        np.testing.assert_array_equal(got.returns, expected.returns)


def test_every_method_is_said_to_read_sums_or_tokens():
    assert sorted(READS_SUMS + READS_TOKENS) == sorted(CREDIT)


@every_name
@every_wrap
@pytest.mark.parametrize("kind", ["outcome", "dense"])
def test_every_number_is_finite_and_zero_where_the_policy_did_not_choose(name, wrap, kind):
    out = credited(WRAPPED[wrap](ALONE[name]), rewarded(kind))
    for field in (out.advantages, out.returns):
        if field is not None:
            assert np.isfinite(field).all()
            assert not field[~out.action_mask].any()
    assert out.advantages.any() == (name != "none")


@every_name
@every_wrap
def test_dense_rewards_with_all_on_the_last_token_are_the_outcome(name, wrap):
    spec, batch = WRAPPED[wrap](ALONE[name]), rewarded("outcome")
    assert_same(credited(spec, placed(batch, {-1: 1.0})), credited(spec, batch))


@every_name
@every_wrap
def test_half_of_the_reward_on_the_first_token_changes_what_reads_tokens_alone(name, wrap):
    spec, batch = WRAPPED[wrap](ALONE[name]), rewarded("outcome")
    got, expected = credited(spec, placed(batch, {0: 0.5, -1: 0.5})), credited(spec, batch)
    if name in READS_SUMS:
        assert_same(got, expected)
    else:
        assert not np.allclose(got.advantages, expected.advantages)


@every_name
@pytest.mark.parametrize("kind", ["outcome", "dense"])
def test_on_macro_actions_of_one_token_it_is_the_method_itself(name, kind):
    batch = rewarded(kind)
    lifted = credited({"name": "macro_actions", "n_gram": 1, "estimator": ALONE[name]}, batch)
    assert_same(lifted, credited(ALONE[name], batch))


@every_name
@pytest.mark.parametrize("kind", ["outcome", "dense"])
def test_reweighted_without_a_lean_and_a_threshold_it_is_the_method_itself(name, kind):
    batch = rewarded(kind)
    idle = {**HIDDEN, "p": 0.0, "beta": float("-inf"), "base": ALONE[name]}
    assert_same(credited(idle, batch), credited(ALONE[name], batch))


@every_name
@pytest.mark.parametrize("kind", ["outcome", "dense"])
def test_reweighted_every_advantage_of_a_mixed_group_is_masked_or_leans_by_half(name, kind):
    batch = rewarded(kind)
    got, base = credited({**HIDDEN, "base": ALONE[name]}, batch).advantages, credited(ALONE[name], batch).advantages
    factors = got[base != 0] / base[base != 0]
    assert set(np.round(factors, 4).tolist()) <= {0.0, 0.5, 1.0, 1.5}
    assert name == "none" or {0.5, 1.5} <= set(np.round(factors, 4).tolist())


@pytest.mark.parametrize("name", [*CREDIT, *OTHERWISE])
@every_wrap
@pytest.mark.parametrize("kind", ["outcome", "dense"])
def test_advantages_are_one_within_each_unit_for_which_a_method_says_so(name, wrap, kind):
    spec = WRAPPED[wrap]({**ALONE, **OTHERWISE}[name])
    out = credited(spec, rewarded(kind))
    units = units_of_one_advantage(spec)
    assert bool(units) == (wrap == "under macro_actions" or (wrap == "plain" and name in WITH_UNITS))
    for unit in units:
        ids = {"response": np.zeros_like(out.turn_ids), "turn": out.turn_ids, "macro": out.segment_ids}[unit]
        for row in range(len(out)):
            span = out.response_slice(row)
            keys, values = ids[span][out.action_mask[span]], out.advantages[span][out.action_mask[span]]
            for key in np.unique(keys):
                assert np.ptp(values[keys == key]) == 0, (unit, row)


WIDE = {"turn": {"turn", "response"}, "response": {"response"}, "macro": {"macro"}}


RATIOS = {ratio: {"name": "ppo_clip", "ratio": ratio} for ratio in ("turn", "macro", "sequence")}
ACCEPTED = [
    (name, wrap, ratio)
    for name, spec in {**ALONE, **OTHERWISE}.items()
    for wrap in WRAPPED
    for ratio, surrogate in RATIOS.items()
    if units_of_one_advantage(WRAPPED[wrap](spec)) & WIDE[pooled_unit(surrogate)[0]]
]


@pytest.mark.parametrize(("name", "wrap", "ratio"), ACCEPTED)
def test_a_kl_in_the_reward_leaves_one_advantage_for_what_has_one_ratio(name, wrap, ratio):
    spec, surrogate = WRAPPED[wrap]({**ALONE, **OTHERWISE}[name]), RATIOS[ratio]
    unit = pooled_unit(surrogate)[0]
    level = kl_level(spec, surrogate)
    worker = CreditWorker(CreditSpec(spec, {"name": "token_mean"}, [], [], True, "k1", "", kl_level=level))
    batch = rewarded("dense")
    out, _ = worker.assign(replace(batch, minibatch_ids=np.zeros(len(batch), np.int32)), 0.3)
    ids = {"response": np.zeros_like(out.turn_ids), "turn": out.turn_ids, "macro": out.segment_ids}[unit]
    for row in range(len(out)):
        span = out.response_slice(row)
        keys, values = ids[span][out.action_mask[span]], out.advantages[span][out.action_mask[span]]
        for key in np.unique(keys):
            assert np.ptp(values[keys == key]) == 0
    plain = worker.assign(replace(batch, minibatch_ids=np.zeros(len(batch), np.int32)), 0.0)[0]
    assert np.allclose(out.advantages, plain.advantages) == (name == "none")
