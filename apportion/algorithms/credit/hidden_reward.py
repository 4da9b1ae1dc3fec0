"""THR and NTHR: reweighting tokens by their influence on the likelihood of the group's right answers (token hidden
reward, arXiv 2510.03669; negative token hidden reward, arXiv 2505.18830).

With s the influence of a token on the correct responses of its group (`apportion.algorithms.influence`):

    THR   A <- 1[|s| > tau] (1 + sign(t) p) A,  t = s in correct, -s in wrong responses; p > 0 exploits, p < 0 explores
    NTHR  A <- eta A  for tokens of wrong responses with s > tau
    tau = beta * min over correct responses of the mean of s;  eta = 2 |0.5 - share of correct responses|

For THR the minimum, and that a response counts in its own s, are our reading of notes on the paper.

Assumes right and wrong answers; a group with only one kind is left as it is. Works on the token advantages of any
credit method, and with every surrogate that keeps them apart (the token form of GSPO, not the sequence form).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.algorithms.influence import VARIANTS, GroupStates, group_influence
from apportion.algorithms.interface import Credit, CreditInput, CreditMethod
from apportion.algorithms.registry import build
from apportion.algorithms.statistics import masked, masked_mean

MODES = ("reweight", "mask")
ETAS = ("imbalance", "success", "failure")


def correct_responses(rewards_B: Tensor, correct_at: float | None) -> Tensor:
    """bool [B]: a reward of 1, or of at least `correct_at`. ValueError for rewards other than 0 and 1 without one."""
    if correct_at is not None:
        return rewards_B >= correct_at
    other = rewards_B[(rewards_B != 0) & (rewards_B != 1)]
    if len(other):
        raise ValueError(
            f"rewards: got {float(other[0])}, expected 0 or 1; set correct_at to the least reward of a right answer"
        )
    return rewards_B == 1


def thresholds(scores_BT: Tensor, mask_BT: Tensor, correct_B: Tensor, group_ids_B: Tensor, beta: float) -> Tensor:
    """tau [B] of each trajectory's group: beta * min over correct responses (with tokens) of the mean score.

    -inf, so nothing is masked, for beta = -inf and for groups without such a response.
    """
    if beta == float("-inf"):
        return torch.full(correct_B.shape, beta, dtype=scores_BT.dtype, device=scores_BT.device)
    tokens_B = mask_BT.sum(-1)
    means_B = masked(scores_BT, mask_BT).sum(-1) / tokens_B.clamp_min(1)
    counted_B = correct_B & (tokens_B > 0)
    _, place_B = torch.unique(group_ids_B, return_inverse=True)
    least = means_B.new_full((len(group_ids_B),), float("inf"))
    least.scatter_reduce_(0, place_B[counted_B], means_B[counted_B], "amin")
    least_B = least[place_B]
    return torch.where(least_B.isinf(), float("-inf"), beta * least_B)


@dataclass
class HiddenReward:
    """Reweights the token advantages of another credit method by hidden reward.

    `base`: the credit method (a mapping with `name` and parameters). `p`: how far THR leans towards (> 0) or away from
    (< 0) what supports right answers; `mode: mask` drops minor tokens and leaves the others' size (p of 0). `beta`
    scales the threshold, `tau` replaces it: for THR, -.inf and any threshold of 0 or less mask nothing; for NTHR, -.inf
    selects every token of wrong responses.
    `eta` is NTHR's factor: `imbalance` 2|0.5 - share correct|, `success` the share, `failure` 1 - share.
    `correct_at`: the least reward of a right answer, needed when rewards as scored are not 0 and 1. What a KL in
    the reward adds to the base's advantages is neither scaled nor masked; where the base whitens, that is what it adds
    after whitening.
    """

    base: Any = field(default_factory=lambda: {"name": "grpo"})
    variant: str = "thr"
    mode: str = "reweight"
    p: float = 0.1
    beta: float = 1.0
    tau: float | None = None
    eta: str = "imbalance"
    correct_at: float | None = None
    group_relative_with: ClassVar[dict[str, Any]] = {}
    one_advantage_per: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for name, valid in (("variant", VARIANTS), ("mode", MODES), ("eta", ETAS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(valid)}")
        if not -1 <= self.p <= 1:
            raise ValueError(f"p: got {self.p}, expected -1 to 1")
        self._base: CreditMethod = build("credit", self.base)
        self.needs = self._base.needs | {"influences"}

    def influence(
        self,
        states: GroupStates,
        lengths_G: Tensor,
        rewards_G: Tensor,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What the platform stores as `influences`, made beside the hidden states: `group_influence` of one group."""
        correct_G = correct_responses(rewards_G, self.correct_at)
        return group_influence(states, lengths_G, correct_G, self.variant, sum_over_ranks)

    def __call__(self, batch: CreditInput) -> Credit:
        credit = self._base(batch)
        factors_BT = self.factors(batch)
        mask_BT = batch.mask_BT
        earned_BT = self._without_kl(batch) if batch.kl_rewards_BT is not None else credit.advantages_BT
        kl_BT = credit.advantages_BT - earned_BT
        changed = {
            "credit/masked_share": float(masked_mean((factors_BT == 0).float(), mask_BT)),
            "credit/mean_factor": float(masked_mean(factors_BT, mask_BT)),
        }
        return Credit(
            masked(earned_BT * factors_BT.to(earned_BT.dtype) + kl_BT, mask_BT),
            credit.returns_BT,
            credit.segment_ids_BT,
            {**credit.metrics, **changed},
        )

    def _without_kl(self, batch: CreditInput) -> Tensor:
        """The base's advantages [B, T] as they were without a KL in the reward."""
        assert batch.kl_rewards_BT is not None
        task_BT = batch.token_rewards_BT - batch.kl_rewards_BT
        return self._base(replace(batch, token_rewards_BT=task_BT, kl_rewards_BT=None)).advantages_BT

    def factors(self, batch: CreditInput) -> Tensor:
        """[B, T]: what each token's advantage is multiplied by; 1 in groups with right or wrong answers alone, and where
        no right answer has a token to be similar to."""
        if batch.influences_BT is None:
            raise ValueError("influences: got none, expected them for hidden reward; declare 'influences' in `needs`")
        mask_BT = batch.mask_BT
        scores_BT = masked(
            batch.influences_BT.to(torch.promote_types(batch.influences_BT.dtype, torch.float32)), mask_BT
        )
        scored_B = batch.rewards_B if batch.scored_rewards_B is None else batch.scored_rewards_B
        correct_B = correct_responses(scored_B, self.correct_at)
        share_B = _share_in_group(correct_B, batch.group_ids_B).to(scores_BT.dtype)
        if self.tau is None:
            tau_B = thresholds(scores_BT, mask_BT, correct_B, batch.group_ids_B, self.beta)
        else:
            tau_B = torch.full_like(share_B, self.tau)
        weigh = self._thr if self.variant == "thr" else self._nthr
        factors_BT = weigh(scores_BT, tau_B[:, None], correct_B[:, None], share_B[:, None])
        shown_B = _share_in_group(correct_B & mask_BT.any(-1), batch.group_ids_B) > 0
        mixed_B1 = (shown_B & (share_B < 1))[:, None]
        return torch.where(mixed_B1 & mask_BT, factors_BT, 1.0)

    def _thr(self, scores_BT: Tensor, tau_B1: Tensor, correct_B1: Tensor, share_B1: Tensor) -> Tensor:
        signed_BT = torch.where(correct_B1, scores_BT, -scores_BT)
        kept_BT = (signed_BT.abs() > tau_B1) | (tau_B1 <= 0)
        lean = self.p if self.mode == "reweight" else 0.0
        return kept_BT * (1 + lean * signed_BT.sign())

    def _nthr(self, scores_BT: Tensor, tau_B1: Tensor, correct_B1: Tensor, share_B1: Tensor) -> Tensor:
        eta_B1 = {"imbalance": 2 * (0.5 - share_B1).abs(), "success": share_B1, "failure": 1 - share_B1}[self.eta]
        if self.mode == "mask":
            eta_B1 = torch.zeros_like(eta_B1)
        return torch.where(~correct_B1 & (scores_BT > tau_B1), eta_B1, 1.0)


def _share_in_group(correct_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """[B] float64: the share of correct responses in each trajectory's group."""
    _, place_B = torch.unique(group_ids_B, return_inverse=True)
    sums = torch.zeros(2, len(group_ids_B), dtype=torch.float64, device=group_ids_B.device)
    sums[0].index_add_(0, place_B, correct_B.double())
    sums[1].index_add_(0, place_B, torch.ones_like(place_B, dtype=torch.float64))
    return (sums[0] / sums[1].clamp_min(1))[place_B]
