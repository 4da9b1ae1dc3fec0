"""No credit: every advantage is 0. For a policy that learns from something else than its advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from apportion.algorithms.interface import Credit, CreditInput


@dataclass
class NoCredit:
    """Rewards are still scored, logged and evaluated; they teach nothing."""

    needs: ClassVar[frozenset[str]] = frozenset()
    one_advantage_per: ClassVar[dict[str, Any]] = {"response": {}}

    def __call__(self, batch: CreditInput) -> Credit:
        return Credit(torch.zeros_like(batch.token_rewards_BT))
