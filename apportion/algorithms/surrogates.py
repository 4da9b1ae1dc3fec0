"""Per-token objectives of the policy and of the critic, not reduced: weights [B, T] of a reduction do that.

rho = exp(policy log-prob - old log-prob), where the log-ratio of a token may be its own or pooled over what it belongs
to. Pooled ratios stand on each token of their unit, and are scaled so that on-policy, with the same advantage on all
tokens of the unit, the gradient is that of the token ratio:

    ratio     log-ratio of a unit            loss of a token               source
    token     its own                        as it is                      PPO
    turn      mean over its turn             as it is                      turn-level importance sampling
    macro     sum over its macro action      / tokens of the macro action  MA-RLHF eq. 3
    sequence  sum over its response          / tokens of the response      RLOO as trained by TRL
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apportion.algorithms.interface import SurrogateInput, SurrogateOutput
from apportion.algorithms.statistics import masked, segment_totals

LOG_RATIO_LIMIT = 20.0  # exp() stays finite; past it a token has no gradient
RATIOS = ("token", "turn", "macro", "sequence")


def token_log_ratios(batch: SurrogateInput) -> Tensor:
    """[B, T] policy - old, 0 where the mask is False."""
    return masked(batch.policy_logprobs_BT - batch.old_logprobs_BT, batch.mask_BT)


def _over_responses(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Total over each row, on all its places, and its token count (at least 1), [B, T] both."""
    totals_BT = masked(values_BT, mask_BT).sum(-1, keepdim=True).expand(mask_BT.shape)
    counts_BT = mask_BT.sum(-1, keepdim=True).clamp_min(1).expand(mask_BT.shape)
    return totals_BT, counts_BT.to(values_BT.dtype)


def _over_units(values_BT: Tensor, unit_ids_BT: Tensor | None, name: str, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Total over each token's unit and the unit's token count (at least 1), [B, T] both."""
    if unit_ids_BT is None:
        raise ValueError(
            f"{name}: got none, expected one id a token for this ratio; use a credit method that gives them"
        )
    counts_BT = segment_totals(torch.ones_like(values_BT), unit_ids_BT, mask_BT).clamp_min(1)
    return segment_totals(values_BT, unit_ids_BT, mask_BT), counts_BT


def log_ratios(batch: SurrogateInput, ratio: str) -> tuple[Tensor, Tensor]:
    """Log-ratio of each token's unit [B, T], clamped to +-20, and what a token's loss is multiplied by [B, T]."""
    own_BT = token_log_ratios(batch)
    scale_BT = torch.ones_like(own_BT)
    if ratio == "turn":
        total_BT, count_BT = _over_units(own_BT, batch.turn_ids_BT, "turn_ids", batch.mask_BT)
        own_BT = total_BT / count_BT
    elif ratio == "macro":
        own_BT, count_BT = _over_units(own_BT, batch.segment_ids_BT, "segment_ids", batch.mask_BT)
        scale_BT = 1 / count_BT
    elif ratio == "sequence":
        own_BT, count_BT = _over_responses(own_BT, batch.mask_BT)
        scale_BT = 1 / count_BT
    return own_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), scale_BT


def clipped_losses(
    ratio_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's -min(rho A, clip(rho, 1 - low, 1 + high) A), and where A < 0 at most -dual_clip A; bool indicators."""
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    losses_BT = torch.maximum(plain_BT, clipped_BT)
    indicators = {"clip_fraction": clipped_BT > plain_BT}
    if dual_clip is not None:
        ceiling_BT = -advantages_BT * dual_clip
        negative_BT = advantages_BT < 0
        indicators["dual_clip_fraction"] = negative_BT & (losses_BT > ceiling_BT)
        losses_BT = torch.where(negative_BT, torch.minimum(losses_BT, ceiling_BT), losses_BT)
    return losses_BT, indicators


def _output(
    batch: SurrogateInput, losses_BT: Tensor, ratio_BT: Tensor, indicators: dict[str, Tensor]
) -> SurrogateOutput:
    """Everything 0 outside the mask; `approx_kl` is k3 of KL(old || policy) from the token's own log-ratio."""
    own_BT = token_log_ratios(batch).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    shown = {**indicators, "ratio": ratio_BT.detach(), "approx_kl": own_BT.exp() - 1 - own_BT}
    return SurrogateOutput(
        losses_BT=masked(losses_BT, batch.mask_BT),
        indicators={name: masked(value.to(losses_BT.dtype), batch.mask_BT) for name, value in shown.items()},
    )


def _check_clip(clip_low: float | None, clip_high: float) -> None:
    if clip_low is not None and not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low: got {clip_low}, expected 0 to 1 (the ratio is kept above 1 - clip_low)")
    if clip_high < 0:
        raise ValueError(f"clip_high: got {clip_high}, expected at least 0 (the ratio is kept below 1 + clip_high)")


@dataclass
class PpoClip:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), of any ratio.

    `clip_high` above `clip_low` is DAPO's clip-higher; `dual_clip` (Ye et al. 2020) bounds what a negative advantage
    costs at a large ratio. With ratio=sequence, `SequenceSum` gives the mean over responses of the clipped objective.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: str = "token"
    pools: ClassVar[dict[str, Any]] = {
        "turn": {"ratio": "turn"},
        "macro": {"ratio": "macro"},
        "response": {"ratio": "sequence"},
    }

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip: got {self.dual_clip}, expected above 1, or none")
        if self.ratio not in RATIOS:
            raise ValueError(f"ratio: got {self.ratio!r}, expected one of {', '.join(RATIOS)}")

    def __call__(self, batch: SurrogateInput) -> SurrogateOutput:
        log_ratio_BT, scale_BT = log_ratios(batch, self.ratio)
        ratio_BT = log_ratio_BT.exp()
        advantages_BT = masked(batch.advantages_BT, batch.mask_BT)
        losses_BT, indicators = clipped_losses(ratio_BT, advantages_BT, self.clip_low, self.clip_high, self.dual_clip)
        return _output(batch, losses_BT * scale_BT, ratio_BT, indicators)


@dataclass
class Gspo:
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071): the ratio is the response's geometric
    mean s = exp(mean of its log-ratios), clipped far tighter than a token's.

    `form`: `token` (GSPO-token, eq. 14: sg[s] * pi / sg[pi], so that advantages may differ by token) or `sequence`
    (eq. 5: s itself, differentiated through all tokens). Equal where a response has one advantage.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    form: str = "token"
    pools: ClassVar[dict[str, Any]] = {"response": {"form": "sequence"}}

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)
        if self.form not in ("token", "sequence"):
            raise ValueError(f"form: got {self.form!r}, expected token or sequence")

    def __call__(self, batch: SurrogateInput) -> SurrogateOutput:
        total_BT, count_BT = _over_responses(token_log_ratios(batch), batch.mask_BT)
        log_ratio_BT = total_BT / count_BT
        if self.form == "token":
            policy_BT = masked(batch.policy_logprobs_BT, batch.mask_BT)
            log_ratio_BT = log_ratio_BT.detach() + policy_BT - policy_BT.detach()
        ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        advantages_BT = masked(batch.advantages_BT, batch.mask_BT)
        losses_BT, indicators = clipped_losses(ratio_BT, advantages_BT, self.clip_low, self.clip_high)
        return _output(batch, losses_BT, ratio_BT, indicators)


@dataclass
class Cispo:
    """Clipped importance weights on REINFORCE (MiniMax-M1, 2025, arXiv 2506.13585, eq. 4-5):
    -sg[clip(rho, 1 - low, 1 + high)] * A * log pi, so that every token keeps a gradient.

    `clip_low` None bounds from above only.
    """

    clip_low: float | None = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)

    def __call__(self, batch: SurrogateInput) -> SurrogateOutput:
        ratio_BT = log_ratios(batch, "token")[0].detach().exp()
        weight_BT = ratio_BT.clamp(None if self.clip_low is None else 1 - self.clip_low, 1 + self.clip_high)
        advantages_BT = masked(batch.advantages_BT, batch.mask_BT)
        losses_BT = -weight_BT * advantages_BT * masked(batch.policy_logprobs_BT, batch.mask_BT)
        return _output(batch, losses_BT, ratio_BT, {"clip_fraction": weight_BT != ratio_BT})


@dataclass
class Reinforce:
    """-A * log pi (Williams 1992), without a ratio: right for one update on each batch."""

    def __call__(self, batch: SurrogateInput) -> SurrogateOutput:
        advantages_BT = masked(batch.advantages_BT, batch.mask_BT)
        losses_BT = -advantages_BT * masked(batch.policy_logprobs_BT, batch.mask_BT)
        return _output(batch, losses_BT, log_ratios(batch, "token")[0].exp(), {})


def value_losses(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float | None = 0.2
) -> SurrogateOutput:
    """The critic's 0.5 * max((V - R)^2, (clip(V, old +- clip) - R)^2), per token of any shape, 0 outside the mask (PPO's
    code).

    `clip` None is plain 0.5 * (V - R)^2. The indicator is `clip_fraction`.
    """
    values_BT, returns_BT = masked(values_BT, mask_BT), masked(returns_BT, mask_BT)
    plain_BT = (values_BT - returns_BT).square()
    if clip is None:
        return SurrogateOutput(losses_BT=0.5 * plain_BT)
    old_BT = masked(old_values_BT, mask_BT)
    clipped_BT = (torch.clamp(values_BT, old_BT - clip, old_BT + clip) - returns_BT).square()
    return SurrogateOutput(
        losses_BT=0.5 * torch.maximum(plain_BT, clipped_BT),
        indicators={"clip_fraction": (clipped_BT > plain_BT).to(plain_BT.dtype)},
    )
