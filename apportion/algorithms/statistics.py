"""Means, variances and totals over what a mask, a group or a segment leaves in.

What lies outside a mask is never read, so it may hold NaN (behaviour log-probs of environment tokens do).
Statistics are float64 whatever they are taken of, and the least value is subtracted before anything is summed: large
rewards that differ by little keep their differences, and the order of rows does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WHITENING_FLOOR = 1e-8  # keeps the division finite where a batch hardly varies

VARIANCES = ("sample", "population", "none")


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is True, 0 elsewhere, whatever stood there."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True places, 0 where there is none; to the last bit the same however they are padded. Scalar float64."""
    chosen = values[mask].double()
    return chosen.sum() / max(1, len(chosen))


def masked_variance(values: Tensor, mask: Tensor, ddof: int = 0) -> Tensor:
    """Variance over the True places with `ddof` taken from the count; 0 where too few are left. Scalar float64."""
    return _variance(_centered(values[mask]), ddof)


def _centered(chosen: Tensor) -> Tensor:
    """[n] float64: what each value is above the mean. Exactly 0 where all values are alike."""
    if not len(chosen):
        return chosen.double()
    shifted = chosen.double() - chosen.min().double()
    return shifted - shifted.mean()


def _variance(centered: Tensor, ddof: int) -> Tensor:
    return centered.square().sum() / max(1, len(centered) - ddof)


def check_variance(name: str, value: str) -> None:
    """ValueError unless `value` is one of VARIANCES."""
    if value not in VARIANCES:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(VARIANCES)}")


def whiten(values: Tensor, mask: Tensor, variance: str = "sample") -> Tensor:
    """Mean 0 and variance 1 over the True places, 0 elsewhere.

    `sample` divides by sqrt(unbiased variance + 1e-8) as verl does, `population` by sqrt(max(biased variance, 1e-8))
    as OpenRLHF does, `none` returns the masked values as they are. Values that are all alike become exactly 0.

    >>> whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]), "population").tolist()
    [-1.0, 1.0, 0.0]
    """
    check_variance("whiten", variance)
    if variance == "none" or not bool(mask.any()):
        return masked(values, mask)
    centered = _centered(values[mask])
    if variance == "sample":
        scale = torch.rsqrt(_variance(centered, 1) + WHITENING_FLOOR)
    else:
        scale = torch.rsqrt(_variance(centered, 0).clamp_min(WHITENING_FLOOR))
    whitened = torch.zeros_like(values)
    whitened[mask] = (centered * scale).to(values.dtype)
    return whitened


@dataclass
class GroupStatistics:
    """What each trajectory's group is like, said once for each trajectory [B] in float64, and counts of groups."""

    mean_B: Tensor
    centered_B: Tensor  # the value less its group's mean; exactly 0 in a constant group
    std_B: Tensor  # ddof 1; 0 in a group of one
    size_B: Tensor
    constant_B: Tensor  # bool: every member has the same value (so in a group of one)
    groups: int
    singletons: int
    constant_groups: int

    def deviation_B(self, variance: str) -> Tensor:
        """std_B, or with `variance` population the same with ddof 0."""
        return self.std_B * ((self.size_B - 1) / self.size_B).sqrt() if variance == "population" else self.std_B

    def metrics(self) -> dict[str, float]:
        return {
            "credit/groups": float(self.groups),
            "credit/singleton_groups": float(self.singletons),
            "credit/constant_groups": float(self.constant_groups),
        }


def group_statistics(values_B: Tensor, group_ids_B: Tensor) -> GroupStatistics:
    """Statistics of `values_B` within groups; members may stand anywhere in the batch.

    >>> group_statistics(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 9])).mean_B.tolist()
    [0.5, 0.5, 5.0]
    """
    values_B = values_B.double()
    _, place_B = torch.unique(group_ids_B, return_inverse=True)
    groups = int(place_B.max()) + 1 if len(place_B) else 0
    edges = values_B.new_zeros(groups)
    high = edges.scatter_reduce(0, place_B, values_B, "amax", include_self=False)
    low = edges.scatter_reduce(0, place_B, values_B, "amin", include_self=False)

    def total(x_B: Tensor) -> Tensor:
        return torch.zeros_like(edges).index_add_(0, place_B, x_B)[place_B]

    size_B, low_B = total(torch.ones_like(values_B)), low[place_B]
    rise_B = total(values_B - low_B) / size_B  # of the mean above the least value
    centered_B = values_B - low_B - rise_B
    return GroupStatistics(
        mean_B=low_B + rise_B,
        centered_B=centered_B,
        std_B=(total(centered_B.square()) / (size_B - 1).clamp_min(1)).sqrt(),
        size_B=size_B,
        constant_B=(high == low)[place_B],
        groups=groups,
        singletons=int((size_B == 1).sum()),
        constant_groups=int((high == low).sum()),
    )


def last_token(mask_BT: Tensor) -> Tensor:
    """bool [B, T], True at the last True of each row; a row without any stays False."""
    later_BT = mask_BT.flip(-1).cumsum(-1).flip(-1)  # how many True stand here or later
    return mask_BT & (later_BT == 1)


def at_last_token(values_B: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T]: each row's value at its last True of the mask, 0 elsewhere."""
    return masked(values_B[:, None].expand(mask_BT.shape), last_token(mask_BT))


def segment_totals(values_BT: Tensor, segment_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T]: for each token of the mask, the sum over the tokens of its row with the same id; 0 elsewhere.

    Ids are at least -1 and need not be sorted. Differentiable in `values_BT`.

    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> segment_totals(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 0, 1]]), mask).tolist()
    [[3.0, 3.0, 4.0]]
    """
    if not values_BT.numel():
        return values_BT
    index_BT = torch.where(mask_BT, segment_ids_BT.long() + 1, 0)
    totals = values_BT.new_zeros(len(values_BT), int(index_BT.max()) + 1)
    totals = totals.scatter_add(1, index_BT, masked(values_BT, mask_BT))
    return masked(totals.gather(1, index_BT), mask_BT)
