"""Statistics in float64 and dtypes that stay: large rewards with a small KL, rows in any order, float64 in and out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from credit_parts import batch_of

from apportion.actors.credit import CreditSpec, CreditWorker, credit_input
from apportion.algorithms.credit.gae import explained_variance, gae_on_tokens, returns_to_go
from apportion.algorithms.interface import CreditInput
from apportion.algorithms.kl import kl_rewards, with_kl_rewards
from apportion.algorithms.registry import CREDIT, build
from apportion.algorithms.statistics import group_statistics, masked_mean, masked_variance, whiten
from apportion.batch import Batch

LARGE = -1.38e6
SPECS = {name: {"name": name} for name in CREDIT}
SPECS["hidden_reward"] |= {"correct_at": LARGE}
WHITENING = [
    {"name": "reinforce_pp"},
    {"name": "reinforce_pp", "baseline": "group"},
    {"name": "reinforce_pp", "whiten": "population"},
    {"name": "gae", "gae_lambda": 0.95},
    {"name": "macro_actions", "n_gram": 2, "whiten": "sample"},
    {"name": "poad", "whiten": "population"},
    {"name": "grpo"},
    {"name": "capo"},
]


def large_batch(seed: int = 0) -> Batch:
    batch = batch_of(seed)
    return replace(batch, rewards=batch.rewards + LARGE)


def reordered(batch: CreditInput, order: torch.Tensor) -> CreditInput:
    changed = {name: value[order] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **changed, wrong_steps=[batch.wrong_steps[i] for i in order.tolist()], texts=None)


def with_kl(batch: CreditInput, level: str = "token") -> CreditInput:
    kl = kl_rewards(batch.old_logprobs_BT, batch.reference_logprobs_BT, batch.mask_BT, 0.1, "k1")
    return with_kl_rewards(batch, kl, level)


@pytest.mark.parametrize("spec", WHITENING, ids=str)
@pytest.mark.parametrize("level", ["token", "response"])
def test_the_order_of_rows_changes_nothing_beside_large_rewards_and_a_small_kl(spec, level):
    batch = with_kl(credit_input(large_batch()), level)
    order = torch.from_numpy(np.random.default_rng(2).permutation(len(batch.mask_BT)))
    expected = build("credit", spec)(batch).advantages_BT[order]
    got = build("credit", spec)(reordered(batch, order)).advantages_BT
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * scale)


def credited(batch: Batch, spec: dict) -> np.ndarray:
    worker = CreditWorker(CreditSpec(spec, {"name": "token_mean"}, [], [], True, "k1", ""))
    return worker.assign(replace(batch, minibatch_ids=np.zeros(len(batch), np.int32)), 0.1)[0].advantages


@pytest.mark.parametrize("spec", [{"name": "reinforce_pp"}, {"name": "grpo"}, {"name": "rloo"}], ids=str)
def test_a_large_reward_for_all_gives_the_advantages_of_the_rewards_without_it(spec):
    batch = batch_of(0)
    whole = batch.select([row for row in range(len(batch)) if batch.action_mask[batch.response_slice(row)].any()])
    expected = credited(whole, spec)
    got = credited(replace(whole, rewards=whole.rewards + LARGE), spec)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # packed as float32


def test_whitening_keeps_small_differences_of_large_float32_values():
    generator = torch.Generator().manual_seed(0)
    values = LARGE + torch.randint(0, 8, (64, 32), generator=generator).float() / 8
    mask = torch.rand(64, 32, generator=generator) > 0.2
    exact = (values - LARGE).double()[mask]
    expected = (exact - exact.mean()) / (exact.var() + 1e-8).sqrt()
    got = whiten(values, mask, "sample")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[mask].double(), expected, rtol=1e-6, atol=1e-6)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(whiten(values[order], mask[order], "sample"), got[order])


def test_statistics_of_large_values_are_those_of_their_differences():
    values, mask = torch.tensor([LARGE, LARGE + 0.25, LARGE + 0.5]), torch.ones(3, dtype=torch.bool)
    assert masked_mean(values, mask).item() == LARGE + 0.25
    assert masked_variance(values, mask, ddof=1).item() == 0.0625
    groups = group_statistics(values, torch.zeros(3).long())
    assert groups.centered_B.tolist() == [-0.25, 0.0, 0.25] and groups.std_B.tolist() == [0.25] * 3
    alike = group_statistics(torch.full((3,), 0.1), torch.zeros(3).long())
    assert alike.centered_B.tolist() == [0.0] * 3


def test_returns_to_go_add_up_a_long_row_in_float64():
    rewards = torch.full((1, 20000), 0.1)
    total = returns_to_go(rewards, torch.ones(1, 20000, dtype=torch.bool), 1.0)[0, 0]
    assert float(total) == pytest.approx(20000 * float(np.float32(0.1)), rel=1e-7)


@pytest.mark.parametrize("name", CREDIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["token", "response"])
def test_credit_has_the_dtype_of_its_input(name, dtype, level):
    batch = credit_input(large_batch())
    cast = {n: v.to(dtype) for n, v in vars(batch).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    out = build("credit", SPECS[name])(with_kl(replace(batch, **cast), level))
    assert out.advantages_BT.dtype == dtype
    assert out.returns_BT is None or out.returns_BT.dtype == dtype
    assert out.advantages_BT.shape == batch.mask_BT.shape


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "overlong", "max_length": 6, "buffer": 4},
        {"name": "length", "per_token": 0.1},
        {"name": "clip", "low": -1.0, "high": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shaping_has_the_dtype_of_its_input(spec, dtype):
    batch = credit_input(batch_of(0))
    batch = replace(batch, rewards_B=batch.rewards_B.to(dtype), token_rewards_BT=batch.token_rewards_BT.to(dtype))
    rewards, token_rewards = build("shaping", spec)(batch, batch.mask_BT.sum(-1))
    assert (rewards.dtype, token_rewards.dtype) == (dtype, dtype)
    held = batch.mask_BT.any(-1)
    torch.testing.assert_close(token_rewards.sum(-1)[held], rewards[held])


def test_gae_of_float64_rewards_and_float32_values_is_float64():
    rewards, values = torch.tensor([[0.1, LARGE]], dtype=torch.float64), torch.tensor([[0.5, 0.25]])
    advantages, returns = gae_on_tokens(rewards, values, torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)
    assert advantages.dtype == returns.dtype == torch.float64
    assert returns.tolist() == [[LARGE + 0.1, LARGE]]
    assert explained_variance(values, returns, torch.ones(1, 2, dtype=torch.bool)) != 0


@pytest.mark.parametrize("spec", WHITENING, ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (1, 1), (3, 2)])
def test_empty_and_one_token_rows_give_numbers(spec, shape):
    """No row, rows without a token, one token, and a row whose tokens are all an environment's."""
    rows = shape[0]
    mask = torch.ones(shape, dtype=torch.bool)
    mask[2:] = False
    zeros = torch.zeros(shape, dtype=torch.float64)
    batch = CreditInput(
        mask_BT=mask, group_ids_B=torch.zeros(rows).long(), rewards_B=torch.zeros(rows, dtype=torch.float64) + LARGE,
        token_rewards_BT=zeros + LARGE, turn_ids_BT=torch.where(mask, 0, -1), terminated_B=torch.ones(rows).bool(),
        values_BT=zeros, step_ids_BT=torch.where(mask, 0, -1), wrong_steps=[[] for _ in range(rows)],
    )  # fmt: skip
    for level in ("token", "response"):
        out = build("credit", spec)(with_kl_rewards(batch, zeros, level))
        assert out.advantages_BT.shape == mask.shape and out.advantages_BT.isfinite().all()
        assert not out.advantages_BT[~mask].any()
