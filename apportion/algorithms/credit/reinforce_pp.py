"""REINFORCE++ and REINFORCE++-baseline (Hu et al. 2025, arXiv 2501.03262).

    baseline none    A_t = whiten(sum over s >= t of gamma^(s-t) * token reward_s)
    baseline group   A_t = whiten(r - mean_group + returns-to-go of the KL in the reward)

whitened over all tokens of the batch. `none` reads token rewards, so dense ones too; `group` reads the outcome, is 0
before whitening where a group's rewards are all alike, and discounts the KL only; not that under one ratio a response,
where the KL is part of r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from apportion.algorithms.credit.gae import returns_to_go
from apportion.algorithms.credit.grpo import centred_outcomes, on_every_token
from apportion.algorithms.interface import Credit, CreditInput
from apportion.algorithms.statistics import check_variance, whiten


@dataclass
class ReinforcePlusPlus:
    """`whiten`: `sample` (unbiased variance, as verl), `population` (as OpenRLHF) or `none`."""

    baseline: str = "none"
    gamma: float = 1.0
    whiten: str = "sample"
    needs: ClassVar[frozenset[str]] = frozenset()
    group_relative_with: ClassVar[dict[str, Any]] = {"baseline": "group"}
    one_advantage_per: ClassVar[dict[str, Any]] = {"response": {"baseline": "group"}}

    def __post_init__(self) -> None:
        if self.baseline not in ("none", "group"):
            raise ValueError(f"baseline: got {self.baseline!r}, expected none or group")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: got {self.gamma}, expected 0 to 1")
        check_variance("whiten", self.whiten)

    def __call__(self, batch: CreditInput) -> Credit:
        if self.baseline == "none":
            raw_BT = returns_to_go(batch.token_rewards_BT, batch.mask_BT, self.gamma)
            return Credit(whiten(raw_BT, batch.mask_BT, self.whiten))
        outcomes_B, groups = centred_outcomes(batch)
        raw_BT = on_every_token(outcomes_B, batch, self.gamma)
        return Credit(whiten(raw_BT, batch.mask_BT, self.whiten), metrics=groups.metrics())
