"""POAD: Bellman backup with action decomposition for multi-turn tasks (arXiv 2405.15821, eq. 13 and 14).

An action is what the policy writes in one turn, tokens w_1..w_n; the environment rewards it at its last token. With V
the value before a token:

    inside an action          delta = r + gamma_w V(next token of the action) - V
    at the last token         delta = r + gamma V(first token of the next action) - V
    A = delta + gamma_* lambda A(next token),  return = A + V

`token_gamma` is gamma_w. 1 is POAD (BAD): discounting counts actions, so the optimum is that of whole actions however
long they are; `token_gamma` equal to `gamma` is the naive token-level backup (NTPO), whose optimum moves with the
length of an action. `level: action` is PPO on whole actions: one value (that before the first token) and one advantage
an action. Lambda still shrinks token by token inside an action, as in the released code.

Environment tokens are skipped and what is carried passes through; a turn without tokens is no step. An episode that a
limit cut is continued by the critic's value, one that ended by 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.algorithms.credit.boundaries import number_segments, turn_starts
from apportion.algorithms.credit.gae import bootstrap_values, gae_on_tokens, required_values
from apportion.algorithms.credit.macro_actions import MacroAxis
from apportion.algorithms.interface import Credit, CreditInput
from apportion.algorithms.statistics import check_variance, masked, masked_mean, masked_variance, whiten

LEVELS = ("token", "action")
NEXT_VALUES = ("first", "last")


def turn_ends(mask_BT: Tensor, turn_ids_BT: Tensor) -> Tensor:
    """bool [B, T]: the last action token of each turn.

    >>> turn_ends(torch.tensor([[True, True, False, True]]), torch.tensor([[0, 0, -1, 1]])).tolist()
    [[False, True, False, True]]
    """
    return turn_starts(mask_BT.flip(-1), turn_ids_BT.flip(-1)).flip(-1)


@dataclass
class Poad:
    """Credit by decomposed backups. Defaults are the paper's; NTPO is `token_gamma: ${gamma}`.

    `gae_lambda` counts tokens (actions at `level: action`). `next_value: last` looks at the last token of the next
    action instead of its first (ARCHER's critic). `whiten` as in `Gae`; the released code normalises with `population`.
    """

    gamma: float = 0.95
    token_gamma: float = 1.0
    gae_lambda: float = 0.95
    level: str = "token"
    next_value: str = "first"
    whiten: str = "none"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    one_advantage_per: ClassVar[dict[str, Any]] = {"turn": {"level": "action"}, "macro": {"level": "action"}}

    def __post_init__(self) -> None:
        for name in ("gamma", "token_gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 to 1")
        for name, valid in (("level", LEVELS), ("next_value", NEXT_VALUES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(valid)}")
        check_variance("whiten", self.whiten)

    def __call__(self, batch: CreditInput) -> Credit:
        values_BT, mask_BT = required_values(batch), batch.mask_BT
        turns = MacroAxis.of(number_segments(turn_starts(mask_BT, batch.turn_ids_BT), mask_BT))
        backup = self._on_actions if self.level == "action" else self._on_tokens
        raw_BT, returns_BT = backup(batch, values_BT, turns)
        return Credit(
            advantages_BT=whiten(raw_BT, mask_BT, self.whiten),
            returns_BT=returns_BT,
            segment_ids_BT=turns.segment_ids_BT if self.level == "action" else None,
            metrics={
                "credit/raw_advantage_mean": float(masked_mean(raw_BT, mask_BT)),
                "credit/raw_advantage_std": float(masked_variance(raw_BT, mask_BT).sqrt()),
                "credit/actions_per_response": float(turns.mask_BN.sum()) / max(1, len(mask_BT)),
            },
        )

    def _on_tokens(self, batch: CreditInput, values_BT: Tensor, turns: MacroAxis) -> tuple[Tensor, Tensor]:
        mask_BT, rewards_BT = batch.mask_BT, batch.token_rewards_BT
        ends_BT = turn_ends(mask_BT, batch.turn_ids_BT)
        if self.next_value == "last":
            rewards_BT = rewards_BT + masked(self.gamma * _last_minus_first_of_next(values_BT, turns), ends_BT)
        # Same dtype as the values, so that the discount of NTPO is the very number a plain GAE multiplies with.
        gamma_BT = torch.full_like(values_BT, self.token_gamma).masked_fill(ends_BT, self.gamma)
        return gae_on_tokens(rewards_BT, values_BT, mask_BT, gamma_BT, self.gae_lambda, bootstrap_values(batch))

    def _on_actions(self, batch: CreditInput, values_BT: Tensor, turns: MacroAxis) -> tuple[Tensor, Tensor]:
        """One step an action; every token of it carries the action's advantage and return."""
        rewards_BN = turns.total(batch.token_rewards_BT)
        values_BN = turns.first(values_BT, fill=0)
        advantages_BN, returns_BN = gae_on_tokens(
            rewards_BN, values_BN, turns.mask_BN, self.gamma, self.gae_lambda, bootstrap_values(batch)
        )
        return turns.on_tokens(advantages_BN), turns.on_tokens(returns_BN)


def _last_minus_first_of_next(values_BT: Tensor, turns: MacroAxis) -> Tensor:
    """[B, T]: how much the value before the next action's last token is above that before its first; 0 in the last."""
    sigma_BT = turns.weights("unit", "later", values_BT.dtype)
    rise_BN = turns.total(masked(values_BT, sigma_BT > 0)) - turns.first(values_BT, fill=0)
    return turns.on_tokens(torch.cat([rise_BN[:, 1:], torch.zeros_like(rise_BN[:, :1])], 1))
