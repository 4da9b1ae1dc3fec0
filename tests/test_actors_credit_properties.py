"""What holds for the credit of every shipped recipe, and for what they combine to, through the worker that cuts the batch."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from credit_parts import GROUPS, batch_of

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.batch import Batch
from apportion.conf import schema

RECIPES = {
    file.stem: yaml.safe_load(file.read_text())["credit"]
    for file in sorted((Path(schema.__file__).parent / "algorithm").glob("*.yaml"))
}
COMBINED = {
    "thr on macro actions of rloo": {
        "name": "hidden_reward",
        "p": 0.5,
        "base": {"name": "macro_actions", "n_gram": 2, "estimator": {"name": "rloo"}},
    },
    "macro actions of thr": {"name": "macro_actions", "n_gram": 3, "estimator": {"name": "hidden_reward", "p": -0.5}},
    "thr on capo": {"name": "hidden_reward", "p": 0.5, "base": {"name": "capo"}},
    "perplexity": {"name": "macro_actions", "termination": "perplexity", "whiten": "sample"},
    "randomised": {"name": "macro_actions", "termination": {"name": "randomised", "sizes": [2, 3]}},
}
METHODS = {**RECIPES, **COMBINED}
COMPARING = [name for name, spec in METHODS.items() if spec["name"] in ("grpo", "rloo", "capo", "hidden_reward")]
every_method = pytest.mark.parametrize("name", METHODS)
# Those that whiten do so over the whole batch, which a row more makes another one.
APART = [n for n, spec in METHODS.items() if spec.get("whiten", "none") == "none" and spec["name"] != "reinforce_pp"]


def worker(name: str) -> CreditWorker:
    return CreditWorker(CreditSpec(METHODS[name], {"name": "token_mean"}, [], [], True, "k1", ""))


def credited(name: str, batch: Batch, shards: int = 1) -> Batch:
    own = worker(name)
    _, *parts = own.cut(len(GROUPS), shards, 1, batch)
    _, *out = own.credit(shards, 0.1, 0, *parts)
    return Batch.concat([shard for shard in out if len(shard)])


def by_row(batch: Batch) -> dict[tuple[int, int], np.ndarray]:
    """[fields, R_i] of each trajectory, by its group and place in it."""
    fields = [batch.advantages, batch.loss_weights, *([] if batch.returns is None else [batch.returns])]
    keys = zip(batch.group_ids.tolist(), batch.sample_indices.tolist(), strict=True)
    return {key: np.stack([field[batch.response_slice(i)] for field in fields]) for i, key in enumerate(keys)}


@every_method
@pytest.mark.parametrize("seed", range(3))
def test_order_and_ranks_change_nothing(name, seed):
    batch = batch_of(seed)
    expected = by_row(credited(name, batch))
    shuffled = batch.select(np.random.default_rng(seed).permutation(len(batch)))
    for other in (credited(name, shuffled), credited(name, batch, 2), credited(name, shuffled, 3)):
        got = by_row(other)
        assert got.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_allclose(got[key], values, rtol=1e-4, atol=1e-5, err_msg=str(key))


@every_method
@pytest.mark.parametrize("seed", range(3))
def test_every_number_is_finite_and_tokens_of_others_have_none(name, seed):
    out = credited(name, batch_of(seed))
    for field in (out.advantages, out.loss_weights, out.value_weights, out.returns):
        if field is not None:
            assert np.isfinite(field).all()
            assert not field[~out.action_mask].any()
    assert out.loss_weights.sum() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("name", APART)
def test_a_longer_response_beside_it_changes_no_groups_credit(name):
    """Padding: groups 2 and 3 alone are five tokens wide, beside a response of 40 tokens forty; whitening apart."""
    batch = batch_of(0)
    narrow = batch.select(np.flatnonzero(batch.group_ids >= 2))
    alone = replace(narrow.select([0]), group_ids=np.array([9]), sample_indices=np.array([7], np.int32))
    for field in fields(alone):
        value = getattr(alone, field.name)
        if field.metadata["axis"] in ("N", "R") and value is not None:
            setattr(alone, field.name, np.concatenate([value, np.repeat(value[-1:], 35)]))
    alone.response_lengths = np.array([40], np.int32)
    own = worker(name)
    expected, _ = own.assign(replace(narrow, minibatch_ids=np.zeros(len(narrow), np.int32)), 0.1)
    both = Batch.concat([narrow, alone])
    got, _ = own.assign(replace(both, minibatch_ids=np.zeros(len(both), np.int32)), 0.1)
    size = len(expected.advantages)
    np.testing.assert_allclose(got.advantages[:size], expected.advantages, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_without_a_wrong_step_and_without_kl_give_exactly_zero(name, reward):
    batch = batch_of(1)
    equal = replace(batch, rewards=np.full(len(batch), reward), wrong_steps=[[] for _ in range(len(batch))])
    own = CreditWorker(CreditSpec(METHODS[name], {"name": "token_mean"}, [], [], False, "k1", ""))
    out, _ = own.assign(replace(equal, minibatch_ids=np.zeros(len(equal), np.int32)), 0.0)
    assert not out.advantages.any()
