"""Distance between the policy and its reference: estimators, the loss, the reward, and the coefficient that adapts.

With x = policy log-prob - reference log-prob of a token sampled from the policy (Schulman, "Approximating KL
divergence"):

    k1 = x                    unbiased, high variance, may be negative; its gradient has expectation zero
    k2 = x^2 / 2              its gradient is, on-policy, that of the reverse KL
    k3 = exp(-x) - 1 + x      unbiased, never negative; its gradient is, on-policy, that of the forward KL
    abs = |x|

So as a loss k2, or k3 with k2's gradient (`straight_through`), moves the policy down the reverse KL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apportion.algorithms.credit.gae import returns_to_go
from apportion.algorithms.interface import CreditInput
from apportion.algorithms.statistics import masked

KL_LEVELS = ("token", "response")
ESTIMATORS = ("k1", "k2", "k3", "abs")
EXPONENT_LIMIT = 20.0  # of k3's exponent, so that it stays finite
VALUE_LIMIT = 10.0  # of an estimate, so that one odd token cannot outweigh the batch (verl for k3, OpenRLHF for all)


def kl_estimates(
    policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3", limit: float | None = VALUE_LIMIT
) -> Tensor:
    """Per-token estimates of KL(policy || reference), of any shape, in float32 or better, clamped to +-`limit`.

    >>> kl_estimates(torch.tensor([-1.0]), torch.tensor([-1.5]), "k1").tolist()
    [0.5]
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"kl estimator: got {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    precise = torch.promote_types(policy_logprobs.dtype, torch.float32)
    x = policy_logprobs.to(precise) - reference_logprobs.to(precise)
    if estimator == "k1":
        kl = x
    elif estimator == "k2":
        kl = x.square() / 2
    elif estimator == "k3":
        exponent = (-x).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
        kl = exponent.exp() - 1 - exponent
    else:
        kl = x.abs()
    return kl if limit is None else kl.clamp(-limit, limit)


def kl_losses(
    policy_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    mask_BT: Tensor,
    estimator: str = "k3",
    straight_through: bool = False,
) -> Tensor:
    """[B, T] to be weighted and added to the policy's losses; 0 where the mask is False.

    `straight_through` keeps the estimator's value and takes k2's gradient (not clamped, so that it never vanishes).
    """
    policy_BT, reference_BT = masked(policy_logprobs_BT, mask_BT), masked(reference_logprobs_BT, mask_BT)
    value_BT = kl_estimates(policy_BT, reference_BT, estimator)
    if not straight_through:
        return value_BT
    slope_BT = kl_estimates(policy_BT, reference_BT, "k2", limit=None)
    return slope_BT - slope_BT.detach() + value_BT.detach()


def kl_rewards(
    old_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    mask_BT: Tensor,
    coefficient: float,
    estimator: str = "k1",
) -> Tensor:
    """-coefficient * KL of each token [B, T], to be added to the token rewards; 0 where the mask is False."""
    kl_BT = kl_estimates(masked(old_logprobs_BT, mask_BT), masked(reference_logprobs_BT, mask_BT), estimator)
    return masked(-coefficient * kl_BT, mask_BT)


def with_kl_rewards(batch: CreditInput, kl_BT: Tensor, level: str = "token") -> CreditInput:
    """The batch with a KL in its rewards, `kl_BT` as `kl_rewards` makes it.

    `token`: each token pays for its own KL and the later ones (`kl_reward_returns`), which is right where each token has
    its own ratio. `response`: the sum over a response is part of its outcome, before any baseline. One ratio over many
    tokens has the gradient of their mean advantage, in which the KL of token s would count (s + 1) / T times.
    """
    if level not in KL_LEVELS:
        raise ValueError(f"kl level: got {level!r}, expected one of {', '.join(KL_LEVELS)}")
    token_rewards_BT = batch.token_rewards_BT + kl_BT.to(batch.token_rewards_BT.dtype)
    if level == "token":
        return replace(batch, token_rewards_BT=token_rewards_BT, kl_rewards_BT=kl_BT)
    return replace(
        batch,
        rewards_B=batch.rewards_B + masked(kl_BT, batch.mask_BT).double().sum(-1).to(batch.rewards_B.dtype),
        token_rewards_BT=token_rewards_BT,
        scored_rewards_B=batch.rewards_B if batch.scored_rewards_B is None else batch.scored_rewards_B,
    )


def kl_reward_returns(batch: CreditInput, gamma: float = 1.0) -> Tensor:
    """[B, T]: what outcome methods add for a KL in the reward, each token's KL penalty and the discounted later ones; 0
    where the KL is in the outcome already."""
    if batch.kl_rewards_BT is None:
        return torch.zeros_like(batch.token_rewards_BT)
    return returns_to_go(batch.kl_rewards_BT.to(batch.token_rewards_BT.dtype), batch.mask_BT, gamma)


@dataclass
class KlCoefficient:
    """The weight of the KL, fixed, or steered towards `target` (Ziegler et al. 2019, arXiv 1909.08593, section 2.2):

        error = clip(kl / target - 1, -0.2, 0.2);   coefficient *= 1 + error * samples / horizon

    `state_dict` / `load_state_dict` carry it through a checkpoint.
    """

    coefficient: float
    target: float | None = None  # None: fixed
    horizon: int = 10000  # samples over which it may change by a fifth

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(f"coefficient: got {self.coefficient}, expected at least 0")
        if self.target is not None and self.target <= 0:
            raise ValueError(f"target: got {self.target}, expected above 0, or none for a fixed coefficient")
        if self.horizon < 1:
            raise ValueError(f"horizon: got {self.horizon}, expected at least 1")

    def update(self, kl: float, samples: int) -> float:
        """The coefficient after a batch of `samples` trajectories whose mean KL was `kl`.

        >>> KlCoefficient(0.1, target=6.0, horizon=100).update(12.0, 10)
        0.10200000000000001
        """
        if self.target is None:
            return self.coefficient
        if kl != kl:
            raise ValueError("kl: got NaN, expected a number; see the step's mismatch and KL metrics")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * samples / self.horizon
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.target is not None:  # a fixed one is what the configuration says, also where that was changed
            self.coefficient = state["coefficient"]
