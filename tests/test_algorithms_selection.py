"""Selection (dynamic sampling, truncated trajectories), reward shaping, and the statistics they stand on."""

import json
from pathlib import Path

import pytest
import torch

from apportion.algorithms.credit.grpo import Grpo
from apportion.algorithms.credit.reinforce_pp import ReinforcePlusPlus
from apportion.algorithms.credit.rloo import Rloo
from apportion.algorithms.interface import CreditInput
from apportion.algorithms.selection import DropTruncated, DynamicSampling, keep_informative
from apportion.algorithms.shaping import LengthPenalty, OverlongPenalty, RewardClip
from apportion.algorithms.statistics import (
    at_last_token,
    group_statistics,
    last_token,
    masked_mean,
    masked_variance,
    segment_totals,
    whiten,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines.json").read_text())


def make_batch(rewards, groups, mask=None, token_rewards=None, terminated=None):
    mask_BT = torch.ones(len(rewards), 3, dtype=torch.bool) if mask is None else torch.tensor(mask)
    rewards_B = torch.tensor(rewards, dtype=torch.float64)
    return CreditInput(
        mask_BT,
        torch.tensor(groups),
        rewards_B,
        at_last_token(rewards_B, mask_BT)
        if token_rewards is None
        else torch.tensor(token_rewards, dtype=torch.float64),
        torch.zeros(mask_BT.shape, dtype=torch.long),
        torch.ones(len(rewards), dtype=torch.bool) if terminated is None else torch.tensor(terminated),
    )


def test_groups_whose_rewards_are_alike_are_dropped():
    batch = make_batch([1.0, 0.5, 1.0, 0.5, 0.7], [4, 2, 4, 9, 9])
    assert DynamicSampling()(batch).tolist() == [False, False, False, True, True]
    assert keep_informative(batch.rewards_B, batch.group_ids_B).tolist() == [False, False, False, True, True]


def test_members_of_a_group_may_stand_anywhere_in_the_batch():
    batch = make_batch([1.0, 0.0, 0.0, 0.0], [7, 3, 7, 3])
    assert DynamicSampling()(batch).tolist() == [True, False, True, False]


def test_a_group_that_is_all_correct_is_kept_where_one_step_was_penalised():
    """CAPO: 2 a token of a correct answer, 1 within a wrong step."""
    token_rewards = [[2.0, 2.0, 2.0], [2.0, 1.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    batch = make_batch([1.0] * 4, [0, 0, 1, 1], token_rewards=token_rewards)
    batch.wrong_steps = [[], [1], [], []]
    assert DynamicSampling()(batch).tolist() == [True, True, False, False]
    assert DynamicSampling(by="outcome")(batch).tolist() == [False] * 4


def test_equal_earnings_of_different_lengths_teach_what_pools_tokens_nothing():
    mask = [[True, True, True], [True, False, False]]
    batch = make_batch([1.0, 1.0], [0, 0], mask, token_rewards=[[2.0, 2.0, 2.0], [2.0, 0.0, 0.0]])
    batch.wrong_steps = [[], []]
    assert DynamicSampling()(batch).tolist() == [False, False]


COMPARING = [Grpo(), Grpo(normalize="population"), Rloo(), ReinforcePlusPlus(baseline="group", whiten="none")]


@pytest.mark.parametrize("method", COMPARING)
def test_dense_rewards_are_kept_exactly_where_a_method_that_compares_gives_credit(method):
    """A tenth off each token of three and of one; sums that are equal, of rewards at different tokens; 1 against 0."""
    mask = [[True, True, True], [True, False, False], *[[True, True, False]] * 4]
    token_rewards = [[-0.1] * 3, [-0.1, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0.0, 0, 0]]
    batch = make_batch([-0.3, -0.1, 1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1, 2, 2], mask, token_rewards)
    taught = method(batch).advantages_BT.any(-1).tolist()
    assert taught == [True, True, False, False, True, True]
    assert DynamicSampling()(batch).tolist() == taught
    if isinstance(method, Grpo) and method.normalize == "std":
        assert method(batch).advantages_BT[:2, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-4)


def test_by_tokens_reads_every_action_token():
    batch = make_batch([1.0, 1.0], [0, 0])
    assert DynamicSampling(by="tokens")(batch).tolist() == [True, True]
    assert DynamicSampling(by="outcome")(batch).tolist() == [False, False]


def test_what_stands_outside_the_mask_does_not_make_a_group_informative():
    nan = float("nan")
    mask = [[True, False, True], [False, True, False]]
    batch = make_batch([1.0, 1.0], [0, 0], mask, token_rewards=[[1.0, nan, 1.0], [nan, 1.0, 5.0]])
    assert DynamicSampling(by="tokens")(batch).tolist() == [False, False]


def test_truncated_trajectories_are_left_out():
    assert DropTruncated()(make_batch([1.0, 0.0], [0, 0], terminated=[True, False])).tolist() == [True, False]


def test_an_unknown_comparison_is_refused():
    with pytest.raises(ValueError, match="by: got 'steps', expected auto, outcome or tokens"):
        DynamicSampling(by="steps")


def test_overlong_penalty_is_that_of_dapo():
    case = GOLDEN["dapo_overlong"]
    config, lengths = case["config"], case["inputs"]["lengths"]
    shaping = OverlongPenalty(config["max_resp_len"], config["buffer"], config["penalty"])
    batch = make_batch([0.0] * len(lengths), [0] * len(lengths))
    rewards_B, token_rewards_BT = shaping(batch, torch.tensor(lengths))
    assert rewards_B.tolist() == case["outputs"]["penalty"]
    assert token_rewards_BT.sum(-1).tolist() == case["outputs"]["penalty"]
    assert token_rewards_BT[:, :2].eq(0).all()


def test_a_length_penalty_counts_tokens_past_the_free_ones_up_to_a_maximum():
    batch = make_batch([1.0, 1.0, 1.0], [0, 0, 0], [[True, True, False]] * 3)
    rewards_B, token_rewards_BT = LengthPenalty(0.25, free_tokens=4, maximum=1.0)(batch, torch.tensor([4, 6, 100]))
    assert rewards_B.tolist() == [1.0, 0.5, 0.0]
    assert token_rewards_BT.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    unbounded, _ = LengthPenalty(0.25)(batch, torch.tensor([4, 6, 100]))
    assert unbounded.tolist() == [0.0, -0.5, -24.0]


def test_clipped_rewards_stay_the_sum_of_their_tokens():
    batch = make_batch([5.0, -3.0, 0.5], [0, 0, 0], token_rewards=[[0, 0, 5.0], [-1.0, -1.0, -1.0], [0, 0.5, 0]])
    rewards_B, token_rewards_BT = RewardClip(-1.0, 2.0)(batch, torch.tensor([3, 3, 3]))
    assert rewards_B.tolist() == [2.0, -1.0, 0.5]
    assert token_rewards_BT.tolist() == [[0, 0, 2.0], [-1.0, -1.0, 1.0], [0, 0.5, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OverlongPenalty(10, 20), "buffer: got 20, expected 1 to max_length=10"),
        (lambda: OverlongPenalty(10, 5, -1.0), "penalty: got -1.0, expected at least 0"),
        (lambda: LengthPenalty(-0.1), "per_token: got -0.1, expected at least 0"),
        (lambda: RewardClip(1.0, 1.0), "high: got 1.0, expected above low=1.0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_masked_statistics_read_the_mask_alone():
    values, mask = torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False])
    assert masked_mean(values, mask).item() == 2.0
    assert masked_variance(values, mask).item() == 1.0
    assert masked_variance(values, mask, ddof=1).item() == 2.0
    assert whiten(values, mask, "population").tolist() == [-1.0, 1.0, 0.0]
    assert whiten(values, mask, "none").tolist() == [1.0, 3.0, 0.0]


def test_statistics_of_nothing_and_of_one_value_are_zero_not_nan():
    values = torch.tensor([4.0, 5.0])
    nothing, one = torch.tensor([False, False]), torch.tensor([False, True])
    for mask in (nothing, one):
        assert masked_variance(values, mask, ddof=1).item() == 0.0
        for variance in ("sample", "population"):
            assert whiten(values, mask, variance).tolist() == [0.0, 0.0]
    assert masked_mean(values, nothing).item() == 0.0


def test_whitening_values_that_are_alike_gives_exactly_zero():
    assert whiten(torch.full((7,), 0.1), torch.ones(7, dtype=torch.bool), "sample").tolist() == [0.0] * 7


def test_group_statistics_are_of_each_trajectorys_own_group():
    groups = group_statistics(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([50, -2, 50]))
    assert groups.mean_B.tolist() == [2.0, 9.0, 2.0]
    assert groups.std_B.tolist() == pytest.approx([2**0.5, 0.0, 2**0.5])
    assert groups.size_B.tolist() == [2.0, 1.0, 2.0]
    assert groups.constant_B.tolist() == [False, True, False]
    assert (groups.groups, groups.singletons, groups.constant_groups) == (2, 1, 1)


def test_the_last_token_is_the_last_true_and_an_empty_row_has_none():
    mask = torch.tensor([[True, False, True, False], [False, False, False, False]])
    assert last_token(mask).tolist() == [[False, False, True, False], [False] * 4]
    assert at_last_token(torch.tensor([2.0, 3.0]), mask).tolist() == [[0.0, 0.0, 2.0, 0.0], [0.0] * 4]


def test_segment_totals_need_no_order_and_pass_gradients():
    values = torch.tensor([[1.0, 2.0, 4.0, float("nan")]], requires_grad=True)
    ids, mask = torch.tensor([[1, 0, 1, -1]]), torch.tensor([[True, True, True, False]])
    totals = segment_totals(values, ids, mask)
    assert totals.tolist() == [[5.0, 2.0, 5.0, 0.0]]
    totals[0, 0].backward()
    assert values.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert segment_totals(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0).bool()).shape == (0, 0)
