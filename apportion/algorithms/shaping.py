"""Changes of the reward before credit. Whatever is added to an outcome is earned at the last action token, so that
`rewards_B` stays the sum of the row's token rewards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from apportion.algorithms.interface import CreditInput
from apportion.algorithms.statistics import at_last_token, masked


def add_to_outcome(batch: CreditInput, added_B: Tensor) -> tuple[Tensor, Tensor]:
    """(rewards_B, token_rewards_BT) with `added_B` on top."""
    token_rewards_BT = masked(batch.token_rewards_BT, batch.mask_BT)
    added_BT = at_last_token(added_B.to(token_rewards_BT.dtype), batch.mask_BT)
    return batch.rewards_B + added_B.to(batch.rewards_B.dtype), token_rewards_BT + added_BT


@dataclass
class OverlongPenalty:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13): 0 up to `max_length - buffer`
    tokens, then linearly down to -`penalty` at `max_length`."""

    max_length: int
    buffer: int
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.max_length:
            raise ValueError(f"buffer: got {self.buffer}, expected 1 to max_length={self.max_length} tokens")
        if self.penalty < 0:
            raise ValueError(f"penalty: got {self.penalty}, expected at least 0 (it is subtracted)")

    def __call__(self, batch: CreditInput, response_lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        over_B = response_lengths_B.to(batch.rewards_B.dtype) - (self.max_length - self.buffer)
        return add_to_outcome(batch, -over_B.clamp_min(0) / self.buffer * self.penalty)


@dataclass
class LengthPenalty:
    """-`per_token` for each token past `free_tokens`, at most `maximum`."""

    per_token: float
    free_tokens: int = 0
    maximum: float | None = None

    def __post_init__(self) -> None:
        for name in ("per_token", "free_tokens", "maximum"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}, expected at least 0")

    def __call__(self, batch: CreditInput, response_lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        over_B = (response_lengths_B.to(batch.rewards_B.dtype) - self.free_tokens).clamp_min(0)
        penalty_B = over_B * self.per_token
        return add_to_outcome(batch, -(penalty_B if self.maximum is None else penalty_B.clamp(max=self.maximum)))


@dataclass
class RewardClip:
    """Outcomes clamped to [`low`, `high`]; what that takes away from dense rewards is taken at the last token."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"high: got {self.high}, expected above low={self.low}")

    def __call__(self, batch: CreditInput, response_lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        return add_to_outcome(batch, batch.rewards_B.clamp(self.low, self.high) - batch.rewards_B)
