"""Generalised advantage estimation, the credit of PPO (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t     = delta_t + gamma * lambda * A_{t+1}
    R_t     = A_t + V_t                                   the critic's target

`t+1` is the next token the policy chose: environment tokens are skipped and what is carried passes through them.
After the last one stands 0 if the episode ended, and the value of the state that would follow if a limit cut it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.algorithms.interface import Credit, CreditInput
from apportion.algorithms.statistics import check_variance, masked, masked_mean, masked_variance, whiten


def gae_on_tokens(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T], both 0 where the mask is False; nothing is read there.

    `gamma` and `gae_lambda` may be tensors [B, T]: the discount between that token and the next one of the mask, so
    that boundaries of actions or turns can have their own. T may count tokens, macro actions or turns alike.
    `bootstrap_B` is the value after the last token, None for 0.

    >>> a, r = gae_on_tokens(torch.tensor([[0., 1.]]), torch.tensor([[.5, .25]]), torch.ones(1, 2).bool(), 1.0, 1.0)
    >>> a.tolist(), r.tolist()
    ([[0.5, 0.75]], [[1.0, 1.0]])
    """
    rows, width = mask_BT.shape
    dtype = torch.promote_types(rewards_BT.dtype, values_BT.dtype)
    rewards_TB = masked(rewards_BT.to(dtype), mask_BT).T.contiguous()
    values_TB = masked(values_BT.to(dtype), mask_BT).T.contiguous()
    mask_TB = mask_BT.T.contiguous()
    gamma_T = gamma.T.contiguous() if isinstance(gamma, Tensor) else [gamma] * width
    lambda_T = gae_lambda.T.contiguous() if isinstance(gae_lambda, Tensor) else [gae_lambda] * width
    carry_B = values_TB.new_zeros(rows)
    next_value_B = values_TB.new_zeros(rows) if bootstrap_B is None else bootstrap_B.to(values_TB.dtype)
    advantages_TB = torch.zeros_like(values_TB)
    for t in range(width - 1, -1, -1):
        delta_B = rewards_TB[t] + gamma_T[t] * next_value_B - values_TB[t]
        advantages_TB[t] = delta_B + gamma_T[t] * lambda_T[t] * carry_B
        carry_B = torch.where(mask_TB[t], advantages_TB[t], carry_B)
        next_value_B = torch.where(mask_TB[t], values_TB[t], next_value_B)
    advantages_BT = masked(advantages_TB.T, mask_BT)
    return advantages_BT, advantages_BT + masked(values_BT.to(dtype), mask_BT)


def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """[B, T]: discounted sum of this token's reward and the later ones of its row; 0 where the mask is False."""
    if gamma == 1:
        sums_BT = masked(rewards_BT, mask_BT).double().flip(-1).cumsum(-1).flip(-1)
        return masked(sums_BT.to(rewards_BT.dtype), mask_BT)
    return gae_on_tokens(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)[0]


def bootstrap_values(batch: CreditInput) -> Tensor:
    """[B]: 0 where the episode ended, the critic's value of the next state where a limit cut it.

    ValueError if a trajectory was cut and the batch has no such values: an unknown value is not 0.
    """
    cut_B = ~batch.terminated_B
    if batch.bootstrap_values_B is None:
        if bool(cut_B.any()):
            raise ValueError(
                f"bootstrap_values: got none for {int(cut_B.sum())} trajectories cut by a limit, "
                "expected the critic's value after the last token"
            )
        return torch.zeros(len(cut_B), dtype=batch.token_rewards_BT.dtype, device=cut_B.device)
    return masked(batch.bootstrap_values_B, cut_B)


def required_values(batch: CreditInput) -> Tensor:
    """`values_BT`, or a ValueError that says where they come from."""
    if batch.values_BT is None:
        raise ValueError("values: got none, expected the critic's value of each token; declare 'values' in `needs`")
    return batch.values_BT


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic; 0 where returns do not vary."""
    total = float(masked_variance(returns_BT, mask_BT))
    if total == 0:
        return 0.0
    return 1.0 - float(masked_variance(returns_BT.double() - values_BT.double(), mask_BT)) / total


@dataclass
class Gae:
    """Advantages by GAE, whitened over all tokens of the batch; returns from the advantages before whitening.

    `whiten`: `sample` (unbiased variance, as verl), `population` (as OpenRLHF) or `none` (as MA-RLHF).
    """

    gamma: float = 1.0
    gae_lambda: float = 1.0
    whiten: str = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    one_advantage_per: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 to 1")
        check_variance("whiten", self.whiten)

    def __call__(self, batch: CreditInput) -> Credit:
        values_BT, mask_BT = required_values(batch), batch.mask_BT
        raw_BT, returns_BT = gae_on_tokens(
            batch.token_rewards_BT, values_BT, mask_BT, self.gamma, self.gae_lambda, bootstrap_values(batch)
        )
        return Credit(
            advantages_BT=whiten(raw_BT, mask_BT, self.whiten),
            returns_BT=returns_BT,
            metrics={
                "credit/raw_advantage_mean": float(masked_mean(raw_BT, mask_BT)),
                "credit/raw_advantage_std": float(masked_variance(raw_BT, mask_BT).sqrt()),
            },
        )
