"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, eq. 7).

    A_i = r_i - mean of the group's other rewards = n / (n - 1) * (r_i - mean_group)

for every token. A group of one has no other member: A is 0, and the group is counted. A KL in the reward is added
as each token's returns-to-go, or under one ratio a response is part of r_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from apportion.algorithms.credit.grpo import centred_outcomes, on_every_token
from apportion.algorithms.interface import Credit, CreditInput


@dataclass
class Rloo:
    """Rewards [1, 0, 0] of one group give [1, -0.5, -0.5]."""

    needs: ClassVar[frozenset[str]] = frozenset()
    group_relative_with: ClassVar[dict[str, Any]] = {}
    one_advantage_per: ClassVar[dict[str, Any]] = {"response": {}}

    def __call__(self, batch: CreditInput) -> Credit:
        outcomes_B, groups = centred_outcomes(batch)
        advantages_B = outcomes_B * groups.size_B / (groups.size_B - 1).clamp_min(1)
        return Credit(on_every_token(advantages_B, batch), metrics=groups.metrics())
