"""MA-RLHF: credit for macro actions, contiguous runs of tokens (arXiv 2410.02743).

A response is cut into macro actions w_1..w_N (see `boundaries`). With t running over the tokens of w:

    R_w = sum_t r_t                      the paper; the released code weights rewards like values (`mean`)
    V_w = sum_t sigma_t V_t              sigma sums to 1 within a macro action
    A_w = GAE over macro actions         gamma and lambda count macro actions, not tokens

and every token has the advantage and the return of its macro action. Assumes that what is rewarded hangs on runs of
tokens more than on single ones; `n_gram: 1` is token-level PPO to the last bit. The policy's ratio stays per token unless
the surrogate uses the segments.

V_w reads the critic at states inside the macro action (the paper's choice), after some of its tokens are chosen. So it is
no unbiased baseline, also with `termination: one`, which otherwise is REINFORCE with the critic as baseline. `n_gram: 1`
has no such bias.

Any other estimator runs on macro actions too (`estimator`): it is handed the batch with macro actions for tokens. For
one that reads critiques a macro action begins with each step too, so that a wrong one keeps its own credit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.algorithms.credit.boundaries import Rule, build_rule, number_segments, turn_starts
from apportion.algorithms.credit.gae import Gae
from apportion.algorithms.interface import Credit, CreditInput, CreditMethod
from apportion.algorithms.registry import build
from apportion.algorithms.statistics import check_variance, last_token, masked, whiten

WEIGHTINGS = ("equal", "unit", "position")
HEAVIER = ("earlier", "later")
AGGREGATIONS = ("sum", "mean")


@dataclass
class MacroAxis:
    """The map between tokens [B, T] and macro actions [B, N], N the most that a row has (right-padded)."""

    segment_ids_BT: Tensor  # int64, -1 where the mask is False
    mask_BN: Tensor  # bool
    sizes_BN: Tensor  # int64, tokens of each macro action

    @staticmethod
    def of(segment_ids_BT: Tensor) -> MacroAxis:
        """ValueError if a segment number below a row's largest has no token."""
        width = int(segment_ids_BT.max()) + 1 if segment_ids_BT.numel() else 0
        sizes_BN = segment_ids_BT.new_zeros(len(segment_ids_BT), width)
        if width:
            sizes_BN.scatter_add_(1, segment_ids_BT.clamp_min(0), (segment_ids_BT >= 0).long())
        mask_BN = sizes_BN > 0
        if bool((mask_BN.long().diff(dim=1) > 0).any()):
            raise ValueError("segment_ids: got a macro action without tokens, expected numbers from 0 without a gap")
        return MacroAxis(segment_ids_BT, mask_BN, sizes_BN)

    def total(self, values_BT: Tensor) -> Tensor:
        """[B, N]: the sum over each macro action's tokens."""
        out_BN = values_BT.new_zeros(self.mask_BN.shape)
        if not self.mask_BN.shape[1]:
            return out_BN
        held_BT = masked(values_BT, self.segment_ids_BT >= 0)
        return out_BN.scatter_add_(1, self.segment_ids_BT.clamp_min(0), held_BT)

    def first(self, values_BT: Tensor, fill: int = -1) -> Tensor:
        """[B, N]: the value at each macro action's first token, `fill` where there is no macro action."""
        begins_BT = self.place_in_segment() == 0
        return torch.where(self.mask_BN, self.total(masked(values_BT, begins_BT)), fill)

    def on_tokens(self, values_BN: Tensor) -> Tensor:
        """[B, T]: each token has the value of its macro action, 0 where the mask is False."""
        if not self.mask_BN.shape[1]:
            return values_BN.new_zeros(self.segment_ids_BT.shape)
        return masked(values_BN.gather(1, self.segment_ids_BT.clamp_min(0)), self.segment_ids_BT >= 0)

    def place_in_segment(self) -> Tensor:
        """[B, T] int64: 0 at a macro action's first token, counting up; -1 where the mask is False."""
        mask_BT = self.segment_ids_BT >= 0
        place_BT = mask_BT.long().cumsum(-1) - 1
        before_BN = self.sizes_BN.cumsum(-1) - self.sizes_BN
        return torch.where(mask_BT, place_BT - self.on_tokens(before_BN), -1)

    def weights(self, weighting: str, heavier: str, dtype: torch.dtype) -> Tensor:
        """sigma [B, T]: sums to 1 over each macro action. `position` falls off as 1, 1/2, 1/3 from its heavier end."""
        mask_BT, sizes_BT, place_BT = self.segment_ids_BT >= 0, self.on_tokens(self.sizes_BN), self.place_in_segment()
        if weighting == "equal":
            return masked(1 / sizes_BT.clamp_min(1).to(dtype), mask_BT)
        if weighting == "unit":
            return (mask_BT & (place_BT == sizes_BT - 1)).to(dtype)
        distance_BT = place_BT if heavier == "earlier" else sizes_BT - 1 - place_BT
        raw_BT = masked(1 / (distance_BT.clamp_min(0) + 1).to(dtype), mask_BT)
        return masked(raw_BT / self.on_tokens(self.total(raw_BT)), mask_BT)


def macro_batch(batch: CreditInput, axis: MacroAxis, sigma_BT: Tensor, reward_aggregation: str) -> CreditInput:
    """The batch with macro actions where tokens were: [B, N] for every [B, T].

    Rewards and log-probs of a macro action are sums over its tokens (rewards weighted like values under `mean`);
    values, entropies and influences are weighted by sigma; turn and step are those of its first token.
    """

    def mean(values_BT: Tensor | None) -> Tensor | None:
        return None if values_BT is None else axis.total(masked(values_BT, sigma_BT > 0) * sigma_BT.to(values_BT.dtype))

    def total(values_BT: Tensor | None) -> Tensor | None:
        return None if values_BT is None else axis.total(values_BT)

    earned = mean if reward_aggregation == "mean" else total
    rewards_BN = earned(batch.token_rewards_BT)
    assert rewards_BN is not None
    return replace(
        batch,
        mask_BT=axis.mask_BN,
        token_rewards_BT=rewards_BN,
        kl_rewards_BT=earned(batch.kl_rewards_BT),
        turn_ids_BT=axis.first(batch.turn_ids_BT),
        token_ids_BT=None,
        old_logprobs_BT=total(batch.old_logprobs_BT),
        reference_logprobs_BT=total(batch.reference_logprobs_BT),
        values_BT=mean(batch.values_BT),
        entropies_BT=mean(batch.entropies_BT),
        influences_BT=mean(batch.influences_BT),
        step_ids_BT=None if batch.step_ids_BT is None else axis.first(batch.step_ids_BT),
        token_ends_BT=None,
    )


@dataclass
class MacroActions:
    """Credit on macro actions, spread over their tokens. They begin where the rule says, and with each step that is judged.

    `termination`: a rule's name, or a mapping with `name` and its parameters (`boundaries`); `n_gram` belongs to the
    fixed rule and to parsing's fallback. `value_weighting`: `equal`, `unit` (the last token alone) or `position`, whose
    `heavier` end is `earlier` (released code) or `later` (appendix). `last_token_alone` makes the last token its own
    macro action, as the released code does lest `mean` dilute the outcome. `whiten` as in `Gae`, over tokens.
    `estimator`: another credit method (a mapping) in place of GAE, which then ignores gamma, gae_lambda and whiten.
    """

    n_gram: int = 5
    termination: Any = "fixed"
    value_weighting: str = "equal"
    heavier: str = "earlier"
    reward_aggregation: str = "sum"
    last_token_alone: bool = False
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten: str = "none"
    estimator: Any = None
    one_advantage_per: ClassVar[dict[str, Any]] = {
        "macro": {},
        "turn": {"termination": "one", "last_token_alone": False, "estimator": None},
    }

    def __post_init__(self) -> None:
        for name, valid in (
            ("value_weighting", WEIGHTINGS),
            ("heavier", HEAVIER),
            ("reward_aggregation", AGGREGATIONS),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(valid)}")
        check_variance("whiten", self.whiten)
        self._rule: Rule = build_rule(self.termination, self.n_gram)
        self._estimator: CreditMethod = self._build_estimator()
        self.needs = self._estimator.needs | self._rule.needs

    def _build_estimator(self) -> CreditMethod:
        if self.estimator is None:
            return Gae(self.gamma, self.gae_lambda, "none")
        return build("credit", self.estimator)

    def influence(self, *group: Any, **more: Any) -> Tensor:
        """The estimator's own hook, for an estimator that needs `influences`."""
        hook: Callable[..., Tensor] = getattr(self._estimator, "influence")  # noqa: B009
        return hook(*group, **more)

    def segments(self, batch: CreditInput) -> tuple[Tensor, dict[str, float]]:
        """Segment ids [B, T] int64, and what the rule counted."""
        starts_BT, metrics = self._rule(batch)
        if "critiques" in self.needs and batch.step_ids_BT is not None:
            starts_BT = starts_BT | turn_starts(batch.mask_BT, batch.step_ids_BT)
        if self.last_token_alone:
            starts_BT = starts_BT | last_token(batch.mask_BT)
        return number_segments(starts_BT, batch.mask_BT), metrics

    def __call__(self, batch: CreditInput) -> Credit:
        segment_ids_BT, counted = self.segments(batch)
        axis = MacroAxis.of(segment_ids_BT)
        dtype = batch.token_rewards_BT.dtype if batch.values_BT is None else batch.values_BT.dtype
        sigma_BT = axis.weights(self.value_weighting, self.heavier, dtype)
        credit = self._estimator(macro_batch(batch, axis, sigma_BT, self.reward_aggregation))
        advantages_BT = axis.on_tokens(credit.advantages_BT)
        returns_BT = None if credit.returns_BT is None else axis.on_tokens(credit.returns_BT)
        metrics = {**credit.metrics, **counted, "credit/macro_action_length": _mean_size(axis)}
        if self.estimator is None:
            advantages_BT = whiten(advantages_BT, batch.mask_BT, self.whiten)
        return Credit(advantages_BT, returns_BT, segment_ids_BT, metrics)


def _mean_size(axis: MacroAxis) -> float:
    return float(axis.sizes_BN.sum()) / max(1, int(axis.mask_BN.sum()))
