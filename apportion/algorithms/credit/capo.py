"""CAPO: a judge model marks wrong steps, the tokens of those steps earn less (arXiv 2508.02298).

k critiques of a response name wrong steps and vote; with r the outcome of response i, a token t earns

    R_it = W_whole r_i - W_process 1[t in a step voted wrong]
    A_it = (R_it - mean) / (std + epsilon)                      over all tokens of the group (eq. 2)

No critic. A group whose answers are all right still carries a signal where a step is wrong; without wrong steps this
is GRPO with statistics pooled over tokens. Assumes W_whole > W_process: a right answer with a wrong step beats a wrong
answer. A KL in the reward is added afterwards, as each token's returns-to-go.

The rewards, the pool and the votes are the paper's; the standard deviation and epsilon are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.algorithms.interface import Credit, CreditInput
from apportion.algorithms.kl import kl_reward_returns
from apportion.algorithms.statistics import GroupStatistics, check_variance, group_statistics, masked

VOTES = ("intersection", "majority", "union")


def vote(critiques: Sequence[Collection[int] | None], rule: str = "majority") -> list[int]:
    """The steps that the critiques find wrong together, increasing. A critique that failed is None and has no vote.

    `majority` takes a step that at least half of the critiques name. No critique left: no wrong step.

    >>> vote([[2, 3], [3], None, [3, 1], [2, 3]])
    [2, 3]
    """
    if rule not in VOTES:
        raise ValueError(f"voting: got {rule!r}, expected one of {', '.join(VOTES)}")
    valid = [set(critique) for critique in critiques if critique is not None]
    counts = Counter(step for critique in valid for step in critique)
    needed = {"intersection": len(valid), "majority": len(valid) / 2, "union": 1}[rule]
    return sorted(step for step, count in counts.items() if count >= needed)


def wrong_tokens(step_ids_BT: Tensor, wrong_steps: Sequence[Sequence[int]], mask_BT: Tensor) -> Tensor:
    """bool [B, T]: tokens of the mask that stand in a wrong step. A wrong step without tokens changes nothing.

    >>> wrong_tokens(torch.tensor([[0, 0, 1]]), [[1]], torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[False, False, True]]
    """
    if len(wrong_steps) != len(step_ids_BT):
        raise ValueError(f"wrong_steps: got {len(wrong_steps)} lists for {len(step_ids_BT)} trajectories")
    for row, steps in enumerate(wrong_steps):
        if any(step < 0 for step in steps):
            raise ValueError(f"wrong_steps: got {list(steps)} for trajectory {row}, expected steps from 0")
    if not step_ids_BT.numel():
        return mask_BT
    known_BT = torch.where(mask_BT, step_ids_BT.long(), -1)
    width = max(int(known_BT.max()), *(max(steps, default=0) for steps in wrong_steps)) + 1
    # Column 0 stands for "no step", so that a token outside any step is never wrong.
    table_BS = torch.zeros(len(wrong_steps), width + 1, dtype=torch.bool, device=mask_BT.device)
    for row, steps in enumerate(wrong_steps):
        table_BS[row, [step + 1 for step in steps]] = True
    return mask_BT & table_BS.gather(1, known_BT.clamp_min(-1) + 1)


@dataclass
class Capo:
    """Defaults are the paper's weights; `std` says how the pool's deviation is taken (`none`: mean alone).

    `voting` is what the judge's stage applies to the critiques of a response, through `vote`.
    """

    outcome_weight: float = 2.0
    process_weight: float = 1.0
    voting: str = "majority"
    critiques: int = 4  # asked of the judge for each response
    std: str = "sample"
    epsilon: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset({"critiques"})
    group_relative_with: ClassVar[dict[str, Any]] = {}
    one_advantage_per: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        check_variance("std", self.std)
        if self.voting not in VOTES:
            raise ValueError(f"voting: got {self.voting!r}, expected one of {', '.join(VOTES)}")
        if self.critiques < 1:
            raise ValueError(f"critiques: got {self.critiques}, expected at least 1")
        if self.outcome_weight < 0 or self.process_weight < 0:
            raise ValueError(
                f"outcome_weight, process_weight: got {self.outcome_weight}, {self.process_weight}, expected at least 0"
            )

    def vote(self, critiques: Sequence[Collection[int] | None]) -> list[int]:
        return vote(critiques, self.voting)

    def token_rewards(self, batch: CreditInput) -> Tensor:
        """R [B, T], 0 where the mask is False."""
        return self._rewards(batch, self._wrong(batch))

    def __call__(self, batch: CreditInput) -> Credit:
        mask_BT, wrong_BT = batch.mask_BT, self._wrong(batch)
        rewards_BT = self._rewards(batch, wrong_BT)
        advantages_BT = torch.zeros_like(rewards_BT)
        metrics = {}
        if bool(mask_BT.any()):
            group_ids_BT = batch.group_ids_B[:, None].expand_as(mask_BT)
            pool = group_statistics(rewards_BT[mask_BT], group_ids_BT[mask_BT])
            advantages_BT[mask_BT] = (pool.centered_B / self._scale(pool)).to(rewards_BT.dtype)
            metrics = {"credit/groups": float(pool.groups), "credit/constant_groups": float(pool.constant_groups)}
        metrics["credit/wrong_token_share"] = float(wrong_BT.sum()) / max(1, int(mask_BT.sum()))
        metrics["credit/penalised_share"] = float(wrong_BT.any(-1).sum()) / max(1, len(mask_BT))
        return Credit(advantages_BT + kl_reward_returns(batch), metrics=metrics)

    def _wrong(self, batch: CreditInput) -> Tensor:
        if batch.step_ids_BT is None or batch.wrong_steps is None:
            raise ValueError("step_ids, wrong_steps: got none, expected both; declare 'critiques' in `needs`")
        return wrong_tokens(batch.step_ids_BT, batch.wrong_steps, batch.mask_BT)

    def _rewards(self, batch: CreditInput, wrong_BT: Tensor) -> Tensor:
        outcome_B1 = (self.outcome_weight * batch.rewards_B.to(batch.token_rewards_BT.dtype))[:, None]
        return masked(outcome_B1 - self.process_weight * wrong_BT.to(outcome_B1.dtype), batch.mask_BT)

    def _scale(self, pool: GroupStatistics) -> Tensor:
        return torch.ones_like(pool.std_B) if self.std == "none" else pool.deviation_B(self.std) + self.epsilon
