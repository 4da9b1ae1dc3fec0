"""Truncated and masked importance weights against the rollout engine, and the measures of the mismatch."""

import json
import math
from pathlib import Path

import pytest
import torch

from apportion.algorithms.correction import (
    ImportanceCorrection,
    correction_metrics,
    mean_weight,
    mismatch_metrics,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines.json").read_text())
ALL = [
    ImportanceCorrection("truncate", "token"),
    ImportanceCorrection("truncate", "sequence"),
    ImportanceCorrection("mask", "token"),
    ImportanceCorrection("mask", "sequence"),
    ImportanceCorrection("mask", "geometric"),
    ImportanceCorrection("truncate", "token", normalize=True),
    ImportanceCorrection("truncate", "token", 5.0, 0.5),
    ImportanceCorrection("mask", "token", 3.0, 0.0, normalize=True),
    ImportanceCorrection("none"),
]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", ["verl_tis_token", "verl_tis_token_bn", "verl_tis_sequence_bn"])
def test_truncated_weights_are_those_of_verl(case):
    config, inputs = GOLDEN[case]["config"], GOLDEN[case]["inputs"]
    correction = ImportanceCorrection(
        "truncate", config["level"], config["threshold"], normalize=config["batch_normalize"]
    )
    ratio_BT, mask_BT = tensor(inputs["log_ratio_train_minus_rollout"]), tensor(inputs["mask"]).bool()
    got = correction(ratio_BT, torch.zeros_like(ratio_BT), mask_BT)
    torch.testing.assert_close(got, tensor(GOLDEN[case]["outputs"]["weights"]), rtol=1e-7, atol=1e-9)


def test_masking_drops_what_is_out_of_bounds_and_keeps_the_rest_as_it_is():
    old = tensor([[0.0, math.log(1.9), math.log(2.1), math.log(0.51), math.log(0.49)]])
    weights = ImportanceCorrection("mask", "token", cap=2.0)(old, torch.zeros_like(old), torch.ones(1, 5).bool())
    torch.testing.assert_close(weights, tensor([[1.0, 1.9, 0.0, 0.51, 0.0]]))


def test_masking_by_the_geometric_mean_judges_the_response_and_keeps_its_tokens_weights():
    old = tensor([[1.0, -1.0, 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    weights = ImportanceCorrection("mask", "geometric", cap=2.0)(old, torch.zeros_like(old), mask)
    torch.testing.assert_close(weights, tensor([[math.e, 1 / math.e, 0.0], [0.0, 0.0, 0.0]]))


def test_masking_by_the_sequence_keeps_the_product_on_every_token():
    old = tensor([[0.2, 0.3], [0.5, 0.7]])
    correction = ImportanceCorrection("mask", "sequence", cap=3.0, floor=0.0)
    weights = correction(old, torch.zeros_like(old), torch.ones(2, 2).bool())
    torch.testing.assert_close(weights, tensor([[math.exp(0.5), math.exp(0.5)], [0.0, 0.0]]))


def test_truncating_to_a_floor_and_masking_without_one():
    old = tensor([[math.log(w) for w in (0.1, 0.5, 1.0, 4.9, 6.0)]])
    behavior, mask = torch.zeros_like(old), torch.ones(1, 5).bool()
    truncated = ImportanceCorrection("truncate", "token", 5.0, 0.5)(old, behavior, mask)  # OpenRLHF's
    torch.testing.assert_close(truncated, tensor([[0.5, 0.5, 1.0, 4.9, 5.0]]))
    masked = ImportanceCorrection("mask", "token", 5.0, 0.0)(old, behavior, mask)  # TRL's
    torch.testing.assert_close(masked, tensor([[0.1, 0.5, 1.0, 4.9, 0.0]]))
    bounded = ImportanceCorrection("mask", "token", 5.0)(old, behavior, mask)  # from 1 / 5
    torch.testing.assert_close(bounded, tensor([[0.0, 0.5, 1.0, 4.9, 0.0]]))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_of_parts_are_normalized_as_those_of_the_whole(level):
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=generator) > 0.4
    mask[2] = False  # a response without action tokens
    correction = ImportanceCorrection("truncate", level, normalize=True)
    zeros = torch.zeros_like(old)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 6)]
    weights = [correction.weights(old[p], zeros[p], mask[p]) for p in parts]
    totals = sum(correction.totals(w, mask[p]) for w, p in zip(weights, parts, strict=True))
    whole = correction(old, zeros, mask)
    torch.testing.assert_close(torch.cat(weights) / mean_weight(totals), whole, rtol=1e-12, atol=0)
    counted = whole[mask] if level == "token" else whole.max(-1).values[mask.any(-1)]
    assert float(counted.mean()) == pytest.approx(1.0, abs=1e-12)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    torch.testing.assert_close(correction(old[order], zeros, mask[order]), whole[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("correction", ALL)
def test_weights_have_the_dtype_of_the_log_probs(correction):
    for dtype in (torch.float32, torch.float64):
        logprobs = torch.tensor([[-1.0, -2.0]], dtype=dtype)
        assert correction(logprobs, logprobs - 0.1, torch.ones(1, 2).bool()).dtype == dtype


def test_what_a_bound_changed_is_counted_by_what_each_method_does():
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights = tensor([[0.5, 1.0, 3.0, 0.0]])
    assert (
        ImportanceCorrection("truncate", cap=3.0, floor=0.5).metrics(weights, mask)["mismatch/share_corrected"] == 0.75
    )
    assert ImportanceCorrection("truncate", cap=3.0).metrics(weights, mask)["mismatch/share_corrected"] == 0.5
    assert ImportanceCorrection("mask", "geometric").metrics(weights, mask)["mismatch/share_corrected"] == 0.25


@pytest.mark.parametrize("correction", ALL)
def test_equal_log_probs_give_weights_of_one_and_zero_outside_the_mask(correction):
    mask = torch.tensor([[True, False, True], [False, False, False]])
    logprobs = torch.where(mask, tensor([[-1.0, 0.0, -2.0], [0.0, 0.0, 0.0]]), float("nan"))
    assert correction(logprobs, logprobs, mask).tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("correction", ALL)
def test_weights_are_finite_however_far_the_log_probs_are(correction):
    old = tensor([[-800.0, 0.0], [0.0, -800.0]])
    weights = correction(old, old.flip(0), torch.ones(2, 2, dtype=torch.bool))
    assert weights.isfinite().all()


def test_a_missing_log_prob_is_an_error_not_a_weight():
    with pytest.raises(ValueError, match="logprobs: got NaN for 1 of 2 action tokens"):
        ImportanceCorrection()(tensor([[-1.0, -1.0]]), tensor([[-1.0, float("nan")]]), torch.ones(1, 2).bool())


def test_mismatch_of_known_differences():
    old, behavior = tensor([-1.0, -2.0, -3.0, -9.0]), tensor([-1.5, -2.0, -2.0, float("nan")])
    mask = torch.tensor([True, True, True, False])
    got = mismatch_metrics(old, behavior, mask, bound=0.6)
    assert got == pytest.approx(
        {
            "mismatch/abs_logprob_diff": 0.5,
            "mismatch/max": 1.0,
            "mismatch/kl": (-0.5 + 0 + 1) / 3,
            "mismatch/k3": ((math.exp(0.5) - 1.5) + (math.exp(-1) - 0)) / 3,
            "mismatch/share_beyond_bound": 1 / 3,
        }
    )


def test_mismatch_is_the_same_packed_and_padded():
    old, behavior = tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]]), tensor([[-1.2, -2.5, 9.0], [-0.1, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    packed = mismatch_metrics(old[mask], behavior[mask], torch.ones(3, dtype=torch.bool), 0.3)
    assert mismatch_metrics(old, behavior, mask, 0.3) == pytest.approx(packed)


def test_mismatch_of_nothing_is_zero():
    got = mismatch_metrics(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0.5)
    assert set(got.values()) == {0.0}


def test_share_corrected_counts_capped_and_masked_tokens():
    metrics = correction_metrics(tensor([[2.0, 0.5, 0.0, 0.0]]), torch.tensor([[True, True, True, False]]), cap=2.0)
    assert metrics == pytest.approx({"mismatch/correction_mean": 2.5 / 3, "mismatch/share_corrected": 2 / 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "clip"}, "method: got 'clip', expected one of none, truncate, mask"),
        ({"level": "turn"}, "level: got 'turn', expected one of token, sequence, geometric"),
        ({"level": "geometric"}, "level: got geometric with method=truncate, expected method=mask"),
        ({"cap": 0.5}, "cap: got 0.5, expected at least 1"),
        ({"floor": 2.0}, "floor: got 2.0, expected 0 to 1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImportanceCorrection(**arguments)
