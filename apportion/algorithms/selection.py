"""Which trajectories take part in credit and update: bool [B], before any signal is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.algorithms.interface import CreditInput
from apportion.algorithms.statistics import group_statistics


def keep_informative(rewards_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """bool [B]: True for the members of groups whose rewards differ. A group of one has nothing to differ from.

    >>> keep_informative(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])).tolist()
    [True, True, False, False]
    """
    return ~group_statistics(rewards_B, group_ids_B).constant_B


def keep_informative_tokens(rewards_BT: Tensor, mask_BT: Tensor, group_ids_B: Tensor) -> Tensor:
    """bool [B]: True for the members of groups in which not every action token has the same reward."""
    rows_B = torch.arange(len(group_ids_B), device=group_ids_B.device)[:, None].expand(mask_BT.shape)[mask_BT]
    varied_B = keep_informative(rewards_BT[mask_BT], group_ids_B[rows_B])
    informative = group_ids_B[rows_B[varied_B]]
    return torch.isin(group_ids_B, informative)


@dataclass
class DynamicSampling:
    """Drops groups that teach a group-relative method nothing (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 11).

    `by`: `outcome` compares the trajectories' rewards, `tokens` those of all action tokens of the group. `auto` compares
    what credit does: tokens where a judge's vote says what they earn (an all-correct group still carries signal if a
    step is wrong), outcomes otherwise, since the other methods that compare read dense rewards by their sum. With a
    method that reads dense rewards token by token (PPO, one of one's own) write `tokens`.
    """

    by: str = "auto"
    # Parameters with which the only response to a prompt is never kept: `always`, or `unjudged` where no judge votes.
    needs_groups: ClassVar[dict[str, Any]] = {"always": {"by": "outcome"}, "unjudged": {"by": "auto"}}

    def __post_init__(self) -> None:
        if self.by not in ("auto", "outcome", "tokens"):
            raise ValueError(f"by: got {self.by!r}, expected auto, outcome or tokens")

    def __call__(self, batch: CreditInput) -> Tensor:
        judged = batch.wrong_steps is not None
        if self.by == "tokens" or (self.by == "auto" and judged):
            return keep_informative_tokens(batch.token_rewards_BT, batch.mask_BT, batch.group_ids_B)
        return keep_informative(batch.rewards_B, batch.group_ids_B)


@dataclass
class DropTruncated:
    """Leaves out trajectories that a limit cut (DAPO's overlong filtering); their groups' means are of the rest."""

    def __call__(self, batch: CreditInput) -> Tensor:
        return batch.terminated_B.clone()
