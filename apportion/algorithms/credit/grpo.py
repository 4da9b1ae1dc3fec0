"""Group-relative credit: GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3-4) and Dr.GRPO (Liu et al. 2025, 2503.20783).

    A = (r - mean_group) / (std_group + eps)      normalize: std (ddof 1), or population (ddof 0)
    A =  r - mean_group                           normalize: none, Dr.GRPO

for every token of the response. Where all rewards of a group are alike, so also in a group of one, A is exactly 0.
Dense rewards count by their sum. A KL in the reward is added to A afterwards, as each token's returns-to-go, so that
it is not divided by the group's spread (the form of OpenRLHF). Under one ratio a response it is part of r, so it is
divided too (the form of verl).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from apportion.algorithms.interface import Credit, CreditInput
from apportion.algorithms.kl import kl_reward_returns
from apportion.algorithms.statistics import GroupStatistics, group_statistics, masked


def centred_outcomes(batch: CreditInput) -> tuple[Tensor, GroupStatistics]:
    """r - mean of its group [B] in float64, exactly 0 where the group's rewards are all alike; and the groups' statistics."""
    groups = group_statistics(batch.rewards_B, batch.group_ids_B)
    return groups.centered_B, groups


def on_every_token(outcomes_B: Tensor, batch: CreditInput, gamma: float = 1.0) -> Tensor:
    """[B, T]: one number a trajectory on each of its tokens, plus the returns of the KL in the reward, if any."""
    spread_BT = outcomes_B.to(batch.token_rewards_BT.dtype)[:, None].expand(batch.mask_BT.shape)
    return masked(spread_BT, batch.mask_BT) + kl_reward_returns(batch, gamma)


@dataclass
class Grpo:
    """`normalize`: `std` for GRPO, `population` for its other form, in which a group with a share p of right answers has
    sqrt((1-p)/p) and -sqrt(p/(1-p)), `none` for Dr.GRPO. Rewards [1, 0] give [0.71, -0.71], [1, -1], [0.5, -0.5].
    """

    normalize: str = "std"
    eps: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset()
    group_relative_with: ClassVar[dict[str, Any]] = {}
    one_advantage_per: ClassVar[dict[str, Any]] = {"response": {}}

    def __post_init__(self) -> None:
        if self.normalize not in ("std", "population", "none"):
            raise ValueError(f"normalize: got {self.normalize!r}, expected std, population or none")
        if self.eps <= 0:
            raise ValueError(f"eps: got {self.eps}, expected above 0")

    def __call__(self, batch: CreditInput) -> Credit:
        outcomes_B, groups = centred_outcomes(batch)
        if self.normalize != "none":
            outcomes_B = outcomes_B / (groups.deviation_B(self.normalize) + self.eps)
        return Credit(on_every_token(outcomes_B, batch), metrics=groups.metrics())
