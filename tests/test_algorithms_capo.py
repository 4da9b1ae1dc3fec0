import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apportion.algorithms.credit.capo import Capo, vote, wrong_tokens
from apportion.algorithms.credit.grpo import Grpo
from apportion.algorithms.interface import CreditInput
from apportion.algorithms.selection import DynamicSampling
from apportion.algorithms.statistics import at_last_token

CASES = {case["name"]: case for case in json.loads((Path(__file__).parent / "golden/capo.json").read_text())["derived"]}


def make_batch(step_rows, outcomes, wrong_steps, groups=None, width=None):
    width = width or max(map(len, step_rows))
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in step_rows], dtype=torch.bool)
    steps = torch.tensor(
        [[*row, *[77] * (width - len(row))] for row in step_rows], dtype=torch.int64
    )  # 77: not to be read
    rewards = torch.tensor(outcomes, dtype=torch.float64)
    return CreditInput(
        mask_BT=mask,
        group_ids_B=torch.tensor(groups or [0] * len(step_rows)),
        rewards_B=rewards,
        token_rewards_BT=torch.where(mask, at_last_token(rewards, mask), float("nan")),
        turn_ids_BT=torch.where(mask, 0, -1),
        terminated_B=torch.ones(len(step_rows), dtype=torch.bool),
        step_ids_BT=steps,
        wrong_steps=wrong_steps,
    )


def golden_batch():
    inputs = CASES["capo_tokens"]["inputs"]
    return make_batch(inputs["step_id_per_token"], inputs["outcome"], inputs["wrong_steps"])


def rows(values_BT, mask_BT):
    return [row[keep].tolist() for row, keep in zip(values_BT, mask_BT, strict=True)]


def test_a_kl_in_the_reward_is_added_as_returns_to_go_and_not_normalised():
    plain, penalised = golden_batch(), golden_batch()
    penalised.kl_rewards_BT = torch.where(plain.mask_BT, -0.25, float("nan"))
    left_BT = plain.mask_BT.flip(-1).cumsum(-1).flip(-1)
    expected_BT = Capo()(plain).advantages_BT - torch.where(plain.mask_BT, 0.25 * left_BT, 0.0)
    torch.testing.assert_close(Capo()(penalised).advantages_BT, expected_BT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "name"), [("intersection", "intersection"), ("majority", "majority_ge_half"), ("union", "union")]
)
def test_votes_are_the_golden_ones(rule, name):
    case = CASES["capo_vote"]
    assert vote(case["inputs"]["critiques_wrong_step_ids"], rule) == case["outputs"][name]


def test_one_clean_critique_empties_the_intersection_and_a_failed_one_has_no_vote():
    assert vote([[1], [], [1]], "intersection") == []
    assert vote([[1], None, [1]], "intersection") == [1]
    assert vote([[1], None, [2], None], "majority") == [1, 2]  # one of two is half
    assert vote([[1], [], []], "majority") == []
    for rule in ("intersection", "majority", "union"):
        assert vote([None, None], rule) == []
        assert vote([], rule) == []
    assert vote([[3, 3], []], "majority") == [3]  # naming a step twice is one vote


@pytest.mark.parametrize("std", ["sample", "population"])
def test_token_rewards_and_advantages_are_the_golden_ones(std):
    batch, outputs = golden_batch(), CASES["capo_tokens"]["outputs"]
    method = Capo(std=std)
    assert rows(method.token_rewards(batch), batch.mask_BT) == outputs["token_rewards"]
    for got, expected in zip(rows(method(batch).advantages_BT, batch.mask_BT), outputs[f"adv_{std}"], strict=True):
        assert got == pytest.approx(expected, rel=1e-9)


def test_without_division_the_pool_mean_alone_is_taken_off():
    batch = golden_batch()
    mean = CASES["capo_tokens"]["outputs"]["group_token_mean"]
    assert Capo(std="none")(batch).advantages_BT[0].tolist() == pytest.approx([2 - mean] * 4 + [0.0])


def test_identical_token_rewards_give_exactly_zero_and_no_division_by_nothing():
    case = CASES["capo_identical_rewards"]
    for std in ("sample", "population", "none"):
        credit = Capo(std=std)(make_batch([[0, 0], [0]], [1, 1], [[], []]))
        assert credit.advantages_BT.tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert case["outputs"]["advantages"] == [[0.0, 0.0], [0.0]]
        assert credit.metrics["credit/constant_groups"] == 1
    tenths = make_batch([[0] * 7] * 3, [0.1] * 3, [[]] * 3)  # their mean is not exactly 0.1 in every order
    assert not bool(Capo()(tenths).advantages_BT.any())


def test_without_wrong_steps_it_is_grpo_with_statistics_over_tokens():
    batch = make_batch([[0] * 3, [0] * 3, [0] * 3], [1, 0, 0], [[], [], []])
    pooled = torch.tensor([2.0] * 3 + [0.0] * 6, dtype=torch.float64)
    expected = (pooled - pooled.mean()) / (pooled.std() + 1e-6)
    torch.testing.assert_close(Capo()(batch).advantages_BT.flatten(), expected)
    # Equal lengths: GRPO's own numbers once the spread is taken the same way.
    grpo = Grpo(normalize="none")(batch).advantages_BT
    torch.testing.assert_close(Capo(std="none", outcome_weight=1.0)(batch).advantages_BT, grpo)


def test_an_all_correct_group_still_has_a_signal_where_a_step_is_wrong():
    batch = make_batch([[0, 1], [0, 0], [0], [0]], [1, 1, 1, 1], [[1], [], [], []], groups=[5, 5, 9, 9])
    credit = Capo()(batch)
    assert credit.advantages_BT[0, 1] < 0 < credit.advantages_BT[0, 0]
    assert credit.advantages_BT[2:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    earned = replace(batch, token_rewards_BT=Capo().token_rewards(batch))
    assert DynamicSampling()(earned).tolist() == [True, True, False, False]
    assert DynamicSampling(by="outcome")(earned).tolist() == [False] * 4
    assert credit.metrics["credit/wrong_token_share"] == pytest.approx(1 / 6)
    assert credit.metrics["credit/penalised_share"] == 0.25


def test_permuting_trajectories_permutes_credit_and_padding_and_other_groups_change_nothing():
    inputs = CASES["capo_tokens"]["inputs"]
    order = [2, 0, 3, 1]
    straight = Capo()(golden_batch())
    moved = make_batch(
        [[0, 1], *[inputs["step_id_per_token"][i] for i in order]],
        [1, *[inputs["outcome"][i] for i in order]],
        [[0], *[inputs["wrong_steps"][i] for i in order]],
        groups=[4, 2, 2, 2, 2],
        width=9,
    )
    credit = Capo()(moved)
    torch.testing.assert_close(credit.advantages_BT[1:, :5], straight.advantages_BT[order], rtol=1e-12, atol=0)
    assert not bool(credit.advantages_BT[:, 5:].any())


def test_a_group_that_lost_members_is_normalised_over_who_is_left():
    batch = make_batch([[0, 1], [0]], [1, 0], [[1], []])
    alone = make_batch([[0, 1]], [1], [[1]])
    assert bool(Capo()(batch).advantages_BT.isfinite().all())
    earned = torch.tensor([2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Capo()(alone).advantages_BT[0], (earned - 1.5) / (earned.std() + 1e-6))


def test_single_tokens_and_empty_responses_are_outside_the_pool_or_alone_in_it():
    credit = Capo()(make_batch([[0], []], [1, 0], [[0], []]))
    assert credit.advantages_BT.tolist() == [[0.0], [0.0]]
    assert Capo()(make_batch([[], []], [1, 0], [[], []], width=0)).advantages_BT.shape == (2, 0)
    assert Capo()(make_batch([[], []], [1, 0], [[1], []], width=2)).advantages_BT.tolist() == [[0.0] * 2] * 2


def test_a_wrong_step_without_tokens_changes_nothing_and_a_negative_one_is_refused():
    mask = torch.ones(1, 3, dtype=torch.bool)
    steps = torch.tensor([[0, -1, 1]])  # the second token is of no step
    assert wrong_tokens(steps, [[9]], mask).tolist() == [[False, False, False]]
    assert wrong_tokens(steps, [[1, 0]], mask).tolist() == [[True, False, True]]
    with pytest.raises(ValueError, match="trajectory 0, expected steps from 0"):
        wrong_tokens(steps, [[-1]], mask)
    with pytest.raises(ValueError, match="got 2 lists for 1 trajectories"):
        wrong_tokens(steps, [[], []], mask)


def test_a_batch_without_critiques_and_settings_that_cannot_be_are_refused():
    batch = golden_batch()
    batch.wrong_steps = None
    with pytest.raises(ValueError, match="declare 'critiques'"):
        Capo()(batch)
    for settings in ({"voting": "average"}, {"std": "max"}, {"critiques": 0}, {"process_weight": -1.0}):
        with pytest.raises(ValueError, match="got"):
            Capo(**settings)
    assert Capo(voting="union").vote([[1], None, []]) == [1]
