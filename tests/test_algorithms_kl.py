"""KL estimators, the loss and reward made of them, and the coefficient that adapts."""

import json
import math
from pathlib import Path

import pytest
import torch

from apportion.algorithms.kl import KlCoefficient, kl_estimates, kl_losses, kl_rewards

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("case", "estimator", "limit"),
    [
        ("verl_kl_abs", "abs", None),
        ("verl_kl_k2", "k2", None),
        ("openrlhf_kl_k2", "k2", 10.0),
        ("openrlhf_kl_k3", "k3", 10.0),
    ],
)
def test_estimates_are_those_of_released_code(case, estimator, limit):
    inputs, outputs = GOLDEN[case]["inputs"], GOLDEN[case]["outputs"]
    got = kl_estimates(tensor(inputs["logprob"]), tensor(inputs["ref"]), estimator, limit)
    # OpenRLHF computes in float32
    rtol = 1e-9 if case.startswith("verl") else 1e-6
    torch.testing.assert_close(got, tensor(outputs["kl"]), rtol=rtol, atol=1e-12 if rtol == 1e-9 else 1e-7)


def test_k1_is_the_log_ratio():
    assert kl_estimates(tensor([-1.0, -2.0]), tensor([-1.5, -1.0]), "k1").tolist() == [0.5, -1.0]


def test_half_precision_is_estimated_in_float32():
    assert (
        kl_estimates(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    )


def test_k1_and_k3_agree_in_expectation_with_the_exact_divergence():
    policy, reference = tensor([0.6, 0.3, 0.1]), tensor([0.2, 0.5, 0.3])
    exact = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        estimate = (policy * kl_estimates(policy.log(), reference.log(), estimator)).sum()
        assert estimate.item() == pytest.approx(exact.item(), rel=1e-12), estimator


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_the_reverse_kl():
    logits = tensor([0.4, -0.2, 0.1]).requires_grad_()
    reference = tensor([0.2, 0.5, 0.3]).log()
    mask = torch.ones(3, dtype=torch.bool)
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    policy = logits.log_softmax(-1)
    losses = kl_losses(policy, reference, mask, "k3", straight_through=True)
    torch.testing.assert_close(losses, kl_estimates(policy, reference, "k3"))
    (got,) = torch.autograd.grad((policy.detach().exp() * losses).sum(), logits)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)


def test_k1_as_a_loss_has_a_gradient_of_expectation_zero():
    logits = tensor([0.4, -0.2, 0.1]).requires_grad_()
    policy = logits.log_softmax(-1)
    losses = kl_losses(policy, tensor([0.2, 0.5, 0.3]).log(), torch.ones(3, dtype=torch.bool), "k1")
    (got,) = torch.autograd.grad((policy.detach().exp() * losses).sum(), logits)
    torch.testing.assert_close(got, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_loss_and_reward_are_zero_outside_the_mask_whatever_stands_there():
    mask = torch.tensor([[True, False]])
    policy = tensor([[-1.0, float("nan")]]).requires_grad_()
    reference = tensor([[-1.5, float("nan")]])
    losses = kl_losses(policy, reference, mask, "k1")
    losses.sum().backward()
    assert losses.tolist() == [[0.5, 0.0]]
    assert policy.grad.tolist() == [[1.0, 0.0]]
    assert kl_rewards(policy.detach(), reference, mask, 0.1, "k1").tolist() == [[-0.05, 0.0]]


def test_an_enormous_distance_stays_finite_in_value_and_gradient():
    policy = tensor([0.0, -500.0]).requires_grad_()
    losses = kl_losses(policy, tensor([-500.0, 0.0]), torch.ones(2, dtype=torch.bool), "k3")
    losses.sum().backward()
    assert losses.tolist() == [10.0, 10.0]
    assert policy.grad.isfinite().all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="kl estimator: got 'k4', expected one of k1, k2, k3, abs"):
        kl_estimates(tensor([0.0]), tensor([0.0]), "k4")


def test_the_coefficient_moves_towards_the_target_by_at_most_a_fifth_an_horizon():
    coefficient = KlCoefficient(0.2, target=6.0, horizon=1000)
    assert coefficient.update(60.0, 500) == pytest.approx(0.2 * 1.1)
    assert coefficient.update(0.0, 1000) == pytest.approx(0.2 * 1.1 * 0.8)
    assert coefficient.update(6.6, 1000) == pytest.approx(0.2 * 1.1 * 0.8 * 1.1)


def test_without_a_target_the_coefficient_is_fixed():
    coefficient = KlCoefficient(0.05)
    assert [coefficient.update(kl, 64) for kl in (0.0, 100.0, math.nan)] == [0.05, 0.05, 0.05]


def test_the_coefficient_survives_a_checkpoint():
    first = KlCoefficient(0.1, target=1.0, horizon=10)
    first.update(5.0, 5)
    second = KlCoefficient(0.1, target=1.0, horizon=10)
    second.load_state_dict(first.state_dict())
    assert second.update(0.5, 3) == first.update(0.5, 3)


def test_a_fixed_coefficient_is_what_the_configuration_says_also_after_a_checkpoint():
    changed = KlCoefficient(0.02)
    changed.load_state_dict(KlCoefficient(0.1).state_dict())
    assert changed.coefficient == 0.02


def test_a_nan_kl_is_an_error_not_a_coefficient():
    with pytest.raises(ValueError, match="kl: got NaN"):
        KlCoefficient(0.1, target=1.0).update(math.nan, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficient": -1.0}, "coefficient: got -1.0, expected at least 0"),
        ({"coefficient": 0.1, "target": 0.0}, "target: got 0.0, expected above 0"),
        ({"coefficient": 0.1, "horizon": 0}, "horizon: got 0, expected at least 1"),
    ],
)
def test_coefficients_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KlCoefficient(**arguments)
