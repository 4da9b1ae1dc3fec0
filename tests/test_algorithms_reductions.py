"""Reductions: the weights themselves, and that no cut of a batch changes what they sum to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.algorithms.reductions import ConstantNorm, SequenceMean, SequenceSum, TokenMean

ALL = [TokenMean(), SequenceMean(), SequenceSum(), ConstantNorm(10)]
MASKS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6).map(torch.tensor)


def test_weights_of_each_reduction():
    mask_BT = torch.tensor([[True, True, False, True], [False, True, False, False]])
    third, sixth = 1 / 3, 1 / 6
    expected = {
        TokenMean: [[0.25, 0.25, 0, 0.25], [0, 0.25, 0, 0]],
        SequenceMean: [[sixth, sixth, 0, sixth], [0, 0.5, 0, 0]],
        SequenceSum: [[0.5, 0.5, 0, 0.5], [0, 0.5, 0, 0]],
    }
    for reduction, weights in expected.items():
        torch.testing.assert_close(reduction()(mask_BT), torch.tensor(weights, dtype=torch.float64))
    constant = torch.tensor([[third / 2, third / 2, 0, third / 2], [0, third / 2, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(ConstantNorm(3)(mask_BT), constant)


@pytest.mark.parametrize("reduction", [TokenMean(), SequenceMean()])
def test_a_mean_has_weights_that_sum_to_one(reduction):
    mask_BT = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    assert reduction(mask_BT).sum().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("reduction", ALL)
@settings(max_examples=25, deadline=None)
@given(mask_BT=MASKS, seed=st.integers(0, 1000), cut=st.integers(0, 6))
def test_two_shards_recombine_to_the_whole(reduction, mask_BT, seed, cut):
    losses_BT = torch.randn(mask_BT.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights_BT = reduction(mask_BT)
    shards = [(weights_BT[:cut] * losses_BT[:cut]).sum(), (weights_BT[cut:] * losses_BT[cut:]).sum()]
    kept = [losses_BT[row][mask_BT[row]] for row in range(len(mask_BT)) if mask_BT[row].any()]
    whole = {
        TokenMean: lambda: torch.cat(kept).mean(),
        SequenceMean: lambda: torch.stack([row.mean() for row in kept]).mean(),
        SequenceSum: lambda: torch.stack([row.sum() for row in kept]).mean(),
        ConstantNorm: lambda: torch.cat(kept).sum() / (len(kept) * 10),
    }[type(reduction)]
    expected = whole().item() if kept else 0.0
    assert sum(shards).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("reduction", ALL)
@settings(max_examples=25, deadline=None)
@given(mask_BT=MASKS, columns=st.integers(0, 3), rows=st.integers(0, 3))
def test_padding_with_columns_and_empty_rows_changes_nothing(reduction, mask_BT, columns, rows):
    padded_BT = torch.nn.functional.pad(mask_BT, (0, columns, 0, rows), value=False)
    weights_BT = reduction(padded_BT)
    assert torch.equal(weights_BT[: len(mask_BT), :5], reduction(mask_BT))
    assert weights_BT[~padded_BT].eq(0).all()


@pytest.mark.parametrize("reduction", ALL)
@pytest.mark.parametrize("shape", [(3, 4), (2, 0), (0, 0)])
def test_a_mask_without_any_token_gives_weights_of_zero(reduction, shape):
    weights_BT = reduction(torch.zeros(shape, dtype=torch.bool))
    assert torch.equal(weights_BT, torch.zeros(shape, dtype=torch.float64))


def test_a_single_token_weighs_one():
    for reduction in (TokenMean(), SequenceMean(), SequenceSum(), ConstantNorm(1)):
        assert reduction(torch.tensor([[True]])).tolist() == [[1.0]]


def test_a_constant_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length: got 0, expected the response limit in tokens, at least 1"):
        ConstantNorm(0)
