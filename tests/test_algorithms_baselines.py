"""Baseline credit (GAE, GRPO, Dr.GRPO, RLOO, REINFORCE++): released code's numbers, and what must always hold."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.algorithms.credit.gae import Gae, explained_variance, gae_on_tokens, returns_to_go
from apportion.algorithms.credit.grpo import Grpo
from apportion.algorithms.credit.reinforce_pp import ReinforcePlusPlus
from apportion.algorithms.credit.rloo import Rloo
from apportion.algorithms.interface import Credit, CreditInput, CreditMethod
from apportion.algorithms.kl import kl_rewards
from apportion.algorithms.statistics import at_last_token, masked

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines.json").read_text())
MASK = torch.tensor(GOLDEN["verl_gae_ppo_k1kl"]["inputs"]["mask"]).bool()
GROUP_METHODS = [
    Grpo(),
    Grpo(normalize="population"),
    Grpo(normalize="none"),
    Rloo(),
    ReinforcePlusPlus(baseline="group"),
    ReinforcePlusPlus(baseline="group", whiten="none"),
]
ALL_METHODS = [*GROUP_METHODS, ReinforcePlusPlus(), ReinforcePlusPlus(gamma=0.9), Gae(gamma=0.99, gae_lambda=0.95)]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def make_batch(rewards, groups=None, mask=MASK, kl_BT=None, **signals):
    mask_BT, rewards_B = torch.as_tensor(mask), tensor(rewards)
    token_rewards_BT = at_last_token(rewards_B, mask_BT)
    return CreditInput(
        mask_BT=mask_BT,
        group_ids_B=torch.tensor(groups if groups is not None else list(range(len(rewards)))),
        rewards_B=rewards_B,
        token_rewards_BT=token_rewards_BT if kl_BT is None else token_rewards_BT + masked(kl_BT, mask_BT),
        turn_ids_BT=torch.where(mask_BT, 0, -1),
        terminated_B=torch.ones(len(rewards), dtype=torch.bool),
        kl_rewards_BT=kl_BT,
        **signals,
    )


def random_batch(seed=0, rows=8, width=7, kl=False):
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(rows, width, generator=generator) > 0.3
    values_BT = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    kl_BT = 0.1 * torch.randn(rows, width, generator=generator, dtype=torch.float64) if kl else None
    rewards = torch.randint(0, 3, (rows,), generator=generator).tolist()
    groups = torch.arange(rows).remainder(3).tolist()
    return make_batch(rewards, groups, mask_BT, kl_BT, values_BT=values_BT)


# verl adds 1e-8 to the number of tokens that it divides by, OpenRLHF sums over the batch in float32
VERL_WHITENING, OPENRLHF_WHITENING = 2e-8, 2e-7


def assert_on_mask(got_BT, expected, tolerance=1e-11):
    expected_BT = torch.where(MASK, tensor(expected), 0)
    torch.testing.assert_close(got_BT, expected_BT, rtol=tolerance, atol=tolerance)


def test_gae_is_that_of_verl():
    case = GOLDEN["verl_gae_ppo_k1kl"]
    batch = make_batch([0.0] * 4, values_BT=tensor(case["inputs"]["values"]))
    batch.token_rewards_BT = tensor(case["inputs"]["token_rewards"])
    credit = Gae(gamma=1.0, gae_lambda=0.95, whiten="sample")(batch)
    assert_on_mask(credit.advantages_BT, case["outputs"]["advantages_whitened"], VERL_WHITENING)
    assert_on_mask(credit.returns_BT, case["outputs"]["returns"])
    raw = Gae(gamma=1.0, gae_lambda=0.95, whiten="none")(batch)
    assert_on_mask(raw.advantages_BT, case["outputs"]["advantages_raw"])


def test_gae_is_that_of_openrlhf():
    raw, case = GOLDEN["openrlhf_gae_raw"], GOLDEN["openrlhf_adv_gae"]
    advantages_BT, returns_BT = gae_on_tokens(
        tensor(raw["inputs"]["token_rewards"]), tensor(raw["inputs"]["values"]), MASK, 1.0, 0.95
    )
    assert_on_mask(advantages_BT, raw["outputs"]["advantages"])
    assert_on_mask(returns_BT, raw["outputs"]["returns"])
    inputs = case["inputs"]
    kl_BT = -0.05 * tensor(inputs["kl"])
    batch = make_batch(inputs["rewards"], kl_BT=kl_BT, values_BT=tensor(inputs["values"]))
    credit = Gae(gamma=1.0, gae_lambda=0.95, whiten="population")(batch)
    assert_on_mask(credit.advantages_BT, case["outputs"]["advantages"], OPENRLHF_WHITENING)
    assert_on_mask(credit.returns_BT, case["outputs"]["returns"])


def test_gae_over_whole_actions_with_a_bootstrap_is_that_of_twosome():
    case = GOLDEN["twosome_action_gae"]
    inputs, gamma = case["inputs"], case["config"]["gamma"]
    advantages_BT, returns_BT = gae_on_tokens(
        tensor([inputs["rewards"]]),
        tensor([inputs["values"]]),
        torch.ones(1, 3, dtype=torch.bool),
        gamma,
        case["config"]["gae_lambda"],
        tensor([inputs["bootstrap_value"]]),
    )
    torch.testing.assert_close(advantages_BT[0], tensor(case["outputs"]["advantages"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns_BT[0], tensor(case["outputs"]["returns"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "method", "tolerance"),
    [
        ("verl_dr_grpo_adv", Grpo(normalize="none"), 1e-11),
        ("verl_reinforce_pp_baseline", ReinforcePlusPlus(baseline="group", whiten="sample"), VERL_WHITENING),
    ],
)
def test_outcome_credit_is_that_of_verl(case, method, tolerance):
    inputs = GOLDEN[case]["inputs"]
    credit = method(make_batch(inputs["scores"], inputs["groups"]))
    assert_on_mask(credit.advantages_BT, GOLDEN[case]["outputs"]["advantages"], tolerance)


def test_reinforce_pp_is_that_of_verl():
    case = GOLDEN["verl_reinforce_pp"]
    batch = make_batch([0.0] * 4)
    batch.token_rewards_BT = tensor(case["inputs"]["token_rewards"])
    assert_on_mask(
        ReinforcePlusPlus(whiten="sample")(batch).advantages_BT, case["outputs"]["advantages"], VERL_WHITENING
    )
    assert_on_mask(ReinforcePlusPlus(whiten="none")(batch).advantages_BT, case["outputs"]["returns"])


@pytest.mark.parametrize(
    ("case", "method", "tolerance"),
    [
        ("openrlhf_adv_rloo", Rloo(), 1e-11),
        ("openrlhf_adv_dr_grpo", Grpo(normalize="none"), 1e-11),
        (
            "openrlhf_adv_reinforce_baseline",
            ReinforcePlusPlus(baseline="group", whiten="population"),
            OPENRLHF_WHITENING,
        ),
    ],
)
def test_outcome_credit_with_kl_in_the_reward_is_that_of_openrlhf(case, method, tolerance):
    inputs = GOLDEN[case]["inputs"]
    groups = [0, 0, 1, 1]  # two samples a prompt
    credit = method(make_batch(inputs["rewards"], groups, kl_BT=-0.05 * tensor(inputs["kl"])))
    assert_on_mask(credit.advantages_BT, GOLDEN[case]["outputs"]["advantages"], tolerance)


def test_grpo_divides_by_the_sample_deviation():
    advantages_BT = Grpo(eps=1e-6)(make_batch([1, 0, 0, 1], [5, 5, 5, 5])).advantages_BT
    expected = 0.5 / (3**-0.5 + 1e-6)
    torch.testing.assert_close(
        advantages_BT[:, 0], tensor([expected, -expected, -expected, expected]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("right", [1, 2, 3, 7])
def test_grpo_by_the_populations_deviation_has_the_closed_form_of_right_and_wrong(right):
    share = right / 8
    rewards = [1.0] * right + [0.0] * (8 - right)
    batch = make_batch(rewards, [3] * 8, torch.ones(8, 1, dtype=torch.bool))
    advantages = Grpo(normalize="population", eps=1e-12)(batch).advantages_BT[:, 0].tolist()
    assert advantages[0] == pytest.approx(((1 - share) / share) ** 0.5, rel=1e-9)
    assert advantages[-1] == pytest.approx(-((share / (1 - share)) ** 0.5), rel=1e-9)
    pair = make_batch([1.0, 0.0], [0, 0], torch.ones(2, 1, dtype=torch.bool))
    assert Grpo(normalize="population")(pair).advantages_BT[:, 0].tolist() == pytest.approx([1.0, -1.0], rel=3e-6)


def test_rloo_compares_with_the_mean_of_the_others():
    advantages_BT = Rloo()(make_batch([3, 0, 0, 7], [1, 1, 1, 2])).advantages_BT
    assert advantages_BT[:, 0].tolist() == [3.0, -1.5, -1.5, 0.0]


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_a_group_of_one_has_credit_zero_and_is_counted(method):
    """verl gives the raw score here (golden verl_grpo_singleton_group): one sample says nothing about the others."""
    assert GOLDEN["verl_grpo_singleton_group"]["outputs"]["advantages"][0][0] == pytest.approx(1.0, abs=1e-5)
    credit = method(make_batch([1.0], [0], mask=MASK[:1]))
    assert torch.equal(credit.advantages_BT, torch.zeros(1, 6, dtype=torch.float64))
    assert credit.metrics == {"credit/groups": 1.0, "credit/singleton_groups": 1.0, "credit/constant_groups": 1.0}


@pytest.mark.parametrize("method", GROUP_METHODS)
@settings(max_examples=25, deadline=None)
@given(reward=st.floats(-1e3, 1e3), members=st.integers(1, 6))
def test_identical_rewards_give_exactly_zero(method, reward, members):
    batch = make_batch([reward] * members, [3] * members, torch.ones(members, 2, dtype=torch.bool))
    assert torch.equal(method(batch).advantages_BT, torch.zeros(members, 2, dtype=torch.float64))


@pytest.mark.parametrize("method", [Grpo(), Grpo(normalize="none"), Rloo()])
def test_dense_task_rewards_count_by_their_sum_where_only_the_outcome_is_read(method):
    plain = make_batch([1.0, 0.5, 2.0, 0.0], [0, 0, 0, 0])
    dense = make_batch([1.0, 0.5, 2.0, 0.0], [0, 0, 0, 0])
    dense.token_rewards_BT = masked(dense.rewards_B[:, None] / MASK.sum(-1, keepdim=True), MASK)
    assert torch.equal(method(dense).advantages_BT, method(plain).advantages_BT)


def test_reinforce_pp_reads_dense_rewards_as_returns_to_go():
    batch = make_batch([3.0], mask=torch.tensor([[True, False, True, True]]))
    batch.token_rewards_BT = tensor([[1.0, 99.0, 0.0, 2.0]])
    assert ReinforcePlusPlus(whiten="none")(batch).advantages_BT.tolist() == [[3.0, 0.0, 2.0, 2.0]]
    assert ReinforcePlusPlus(whiten="none", gamma=0.5)(batch).advantages_BT.tolist() == [[1.5, 0.0, 1.0, 2.0]]


def test_kl_in_the_reward_reaches_an_outcome_method_as_returns_to_go_not_divided_by_the_spread():
    kl_BT = kl_rewards(
        tensor([[-1.0, -1.0], [-1.0, -1.0]]), tensor([[-2.0, -1.5], [-1.0, -1.0]]), MASK[:2, :2], 0.1, "k1"
    )
    batch = make_batch([1.0, 0.0], [0, 0], torch.ones(2, 2, dtype=torch.bool), kl_BT)
    unit = 0.5 / (0.5**0.5 + 1e-6)
    expected = tensor([[unit - 0.15, unit - 0.05], [-unit, -unit]])
    torch.testing.assert_close(Grpo()(batch).advantages_BT, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [Grpo(), Grpo(normalize="none"), Rloo()])
def test_dense_task_rewards_beside_a_kl_in_the_reward_are_not_taken_for_it(method):
    mask, kl_BT = torch.ones(2, 2, dtype=torch.bool), tensor([[-0.1, -0.2], [0.0, -0.3]])
    plain = make_batch([1.0, 0.0], [0, 0], mask, kl_BT)
    dense = make_batch([1.0, 0.0], [0, 0], mask, kl_BT)
    dense.token_rewards_BT = tensor([[0.75, 0.25], [0.5, -0.5]]) + kl_BT
    assert torch.equal(method(dense).advantages_BT, method(plain).advantages_BT)


def test_environment_tokens_are_skipped_and_carry_passes_through():
    rewards, values = [[0.5, 7.0, 7.0, 1.0]], [[0.2, float("nan"), float("nan"), 0.4]]
    mask = torch.tensor([[True, False, False, True]])
    with_gap = gae_on_tokens(tensor(rewards), tensor(values), mask, 0.9, 0.8)
    without = gae_on_tokens(tensor([[0.5, 1.0]]), tensor([[0.2, 0.4]]), torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8)
    for gap, plain in zip(with_gap, without, strict=True):
        assert gap[0, [0, 3]].tolist() == plain[0].tolist()
        assert gap[0, 1:3].tolist() == [0.0, 0.0]


def test_a_trajectory_cut_by_a_limit_bootstraps_and_an_ended_one_does_not():
    batch = make_batch(
        [0.0, 0.0], mask=torch.ones(2, 2, dtype=torch.bool), values_BT=tensor([[0.5, 0.25], [0.5, 0.25]])
    )
    batch.terminated_B = torch.tensor([True, False])
    batch.bootstrap_values_B = tensor([8.0, 1.0])
    returns_BT = Gae(gamma=0.5, gae_lambda=1.0)(batch).returns_BT
    assert returns_BT.tolist() == [[0.0, 0.0], [0.25, 0.5]]


def test_an_unknown_bootstrap_value_is_an_error_not_zero():
    batch = make_batch([0.0], mask=torch.ones(1, 2, dtype=torch.bool), values_BT=torch.zeros(1, 2))
    batch.terminated_B = torch.tensor([False])
    with pytest.raises(ValueError, match="bootstrap_values: got none for 1 trajectories cut by a limit"):
        Gae()(batch)


def test_gae_without_values_says_where_they_come_from():
    with pytest.raises(ValueError, match="values: got none, expected the critic's value of each token"):
        Gae()(make_batch([1.0], mask=MASK[:1]))


def test_discounts_by_token_equal_the_same_discount_everywhere():
    batch = random_batch(3)
    arguments = (batch.token_rewards_BT, batch.values_BT, batch.mask_BT)
    by_token = gae_on_tokens(*arguments, torch.full((8, 7), 0.9), torch.full((8, 7), 0.7))
    for got, expected in zip(by_token, gae_on_tokens(*arguments, 0.9, 0.7), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_lambda_one_returns_are_the_discounted_rewards():
    batch = random_batch(4, kl=True)
    returns_BT = gae_on_tokens(batch.token_rewards_BT, batch.values_BT, batch.mask_BT, 0.9, 1.0)[1]
    torch.testing.assert_close(
        returns_BT, returns_to_go(batch.token_rewards_BT, batch.mask_BT, 0.9), rtol=1e-9, atol=1e-9
    )


def test_explained_variance_is_one_for_a_perfect_critic():
    batch = make_batch([1.0, 0.0, 3.0, 2.0])
    values_BT = masked(batch.rewards_B[:, None].expand(4, 6), MASK)
    returns_BT = gae_on_tokens(batch.token_rewards_BT, values_BT, MASK, 1.0, 1.0)[1]
    assert explained_variance(values_BT, returns_BT, MASK) == pytest.approx(1.0)
    assert explained_variance(torch.zeros_like(values_BT), returns_BT, MASK) == pytest.approx(0.0)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_keeps_the_contract(method):
    batch = random_batch(1, kl=True)
    credit = method(batch)
    assert isinstance(method, CreditMethod)
    assert isinstance(credit, Credit)
    assert credit.advantages_BT.dtype == batch.token_rewards_BT.dtype
    assert (credit.advantages_BT[~batch.mask_BT] == 0).all()
    assert all(isinstance(value, float) for value in credit.metrics.values())


@pytest.mark.parametrize("method", ALL_METHODS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kl=st.booleans())
def test_permuting_trajectories_permutes_credit(method, seed, kl):
    batch = random_batch(seed, kl=kl)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    shuffled = CreditInput(
        batch.mask_BT[order],
        batch.group_ids_B[order],
        batch.rewards_B[order],
        batch.token_rewards_BT[order],
        batch.turn_ids_BT[order],
        batch.terminated_B[order],
        kl_rewards_BT=batch.kl_rewards_BT[order] if kl else None,
        values_BT=batch.values_BT[order],
    )
    got, expected = method(shuffled).advantages_BT, method(batch).advantages_BT[order]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ALL_METHODS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, 4), kl=st.booleans())
def test_padding_changes_nothing_and_is_never_read(method, seed, columns, kl):
    batch = random_batch(seed, kl=kl)

    def widen(x, fill):
        return torch.nn.functional.pad(x, (0, columns), value=fill)

    mask_BT = widen(batch.mask_BT, False)
    padded = CreditInput(
        mask_BT,
        batch.group_ids_B,
        batch.rewards_B,
        torch.where(mask_BT, widen(batch.token_rewards_BT, 0.0), float("nan")),
        widen(batch.turn_ids_BT, -1),
        batch.terminated_B,
        kl_rewards_BT=torch.where(mask_BT, widen(batch.kl_rewards_BT, 0.0), float("nan")) if kl else None,
        values_BT=torch.where(mask_BT, widen(batch.values_BT, 0.0), float("nan")),
    )
    got, expected = method(padded).advantages_BT, method(batch).advantages_BT
    torch.testing.assert_close(got[:, :7], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(got[:, 7:], torch.zeros(8, columns, dtype=torch.float64))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_single_token_and_all_masked_responses_give_numbers(method):
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    credit = method(make_batch([1.0, 5.0, 0.0], [0, 0, 0], mask, values_BT=torch.zeros(3, 2, dtype=torch.float64)))
    assert credit.advantages_BT.isfinite().all()
    assert credit.advantages_BT[1].tolist() == [0.0, 0.0]
    nothing = make_batch([1.0, 0.0], [0, 0], torch.zeros(2, 3, dtype=torch.bool), values_BT=torch.zeros(2, 3).double())
    assert torch.equal(method(nothing).advantages_BT, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gae(gamma=1.5), "gamma: got 1.5, expected 0 to 1"),
        (lambda: Gae(whiten="batch"), "whiten: got 'batch', expected one of sample, population, none"),
        (lambda: Grpo(normalize="mean"), "normalize: got 'mean', expected std, population or none"),
        (lambda: Grpo(eps=0.0), "eps: got 0.0, expected above 0"),
        (lambda: ReinforcePlusPlus(baseline="critic"), "baseline: got 'critic', expected none or group"),
        (lambda: ReinforcePlusPlus(gamma=-1), "gamma: got -1, expected 0 to 1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
