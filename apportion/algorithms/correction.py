"""What the rollout engine's log-probs differ by from the trainer's: importance weights against it, and how large it is.

The engine samples from mu, the trainer differentiates pi_old; both should be the same weights, but kernels and number
formats differ. w = pi_old / mu of a token, or of a whole response, multiplies the token's loss (Yao et al. 2025,
"Your efficient RL framework secretly brings you off-policy RL training").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.algorithms.statistics import masked, masked_mean

LOG_WEIGHT_LIMIT = 20.0  # exp() stays finite before it is capped
METHODS = ("none", "truncate", "mask")
LEVELS = ("token", "sequence", "geometric")


def log_weights(old_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Tensor:
    """old - behaviour log-prob of each token of the mask, 0 elsewhere; ValueError where one of them is not known."""
    difference = masked(old_logprobs - behavior_logprobs, mask)
    unknown = int(difference.isnan().sum())
    if unknown:
        raise ValueError(
            f"logprobs: got NaN for {unknown} of {int(mask.sum())} action tokens, expected the engine's and the "
            "trainer's log-prob of each; set algorithm.correction.method=none for an engine that gives none"
        )
    return difference


@dataclass
class ImportanceCorrection:
    """Weights [B, T] for the token losses, 0 where the mask is False, all 1 with method=none.

    `truncate`: min(w, cap), and at least `floor` where there is one. Low variance, some bias: the default.
    `mask`: w where floor <= w <= cap, else 0. `floor` None is 1 / cap; 0 masks from above alone.
    `level`: the w of each `token`; of the `sequence`, the product over its tokens, on all of them; or, only to mask,
    the `geometric` mean of the response decides and its tokens keep their own weights.
    `normalize` divides by the weights' mean, so that correcting does not change the step size.

    As others do it (method, level, cap, floor):

        OpenRLHF   tis: truncate token 5 0.5      icepop: mask token 5 0.5      seq-mask-tis: mask geometric 5 0.5
        verl       truncate token 2, or truncate sequence 2; with or without `normalize`
        TRL        mask sequence 3 0 (its default), truncate sequence 3, mask token 3 0, truncate token 3
    """

    method: str = "truncate"
    level: str = "token"
    cap: float = 2.0
    floor: float | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        for name, valid in (("method", METHODS), ("level", LEVELS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(valid)}")
        if self.level == "geometric" and self.method != "mask":
            raise ValueError(f"level: got geometric with method={self.method}, expected method=mask")
        if self.cap < 1:
            raise ValueError(f"cap: got {self.cap}, expected at least 1")
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise ValueError(f"floor: got {self.floor}, expected 0 to 1, or none")

    def __call__(self, old_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The weights of a whole optimizer step. Of a part of one, normalize with `totals` summed over the parts."""
        weights_BT = self.weights(old_logprobs_BT, behavior_logprobs_BT, mask_BT)
        return weights_BT / mean_weight(self.totals(weights_BT, mask_BT)) if self.normalize else weights_BT

    def weights(self, old_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Before normalizing: each row by itself."""
        if self.method == "none":
            return mask_BT.to(old_logprobs_BT.dtype)
        own_BT = log_weights(old_logprobs_BT, behavior_logprobs_BT, mask_BT)
        pooled_BT = self._pooled(own_BT, mask_BT)
        judged_BT = pooled_BT.clamp(-LOG_WEIGHT_LIMIT, LOG_WEIGHT_LIMIT).exp()
        if self.method == "truncate":
            weights_BT = judged_BT.clamp(self.floor, self.cap)
        else:
            floor = 1 / self.cap if self.floor is None else self.floor
            carried_BT = own_BT if self.level == "geometric" else pooled_BT
            kept_BT = (judged_BT >= floor) & (judged_BT <= self.cap)
            weights_BT = masked(carried_BT.clamp(-LOG_WEIGHT_LIMIT, LOG_WEIGHT_LIMIT).exp(), kept_BT)
        return masked(weights_BT, mask_BT)

    def _pooled(self, own_BT: Tensor, mask_BT: Tensor) -> Tensor:
        if self.level == "token":
            return own_BT
        total_B1 = own_BT.sum(-1, keepdim=True)
        if self.level == "geometric":
            total_B1 = total_B1 / mask_BT.sum(-1, keepdim=True).clamp_min(1)
        return total_B1.expand(own_BT.shape)

    def totals(self, weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[2] float64: the sum of the weights and how many there are, over tokens, or over responses where one weight
        stands for each."""
        counted_BT = mask_BT & (mask_BT.cumsum(-1) == 1) if self.level == "sequence" else mask_BT
        counted = weights_BT[counted_BT].double()
        return torch.stack(
            [counted.sum(), torch.tensor(float(len(counted)), dtype=torch.float64, device=counted.device)]
        )

    def metrics(self, weights_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
        """Of weights before normalizing: their mean, and the share of tokens that a bound changed."""
        if self.method == "mask":  # a kept weight may be anything at level=geometric
            return correction_metrics(weights_BT, mask_BT, float("inf"))
        return correction_metrics(weights_BT, mask_BT, self.cap, self.floor)


def mean_weight(totals: Tensor) -> float:
    """The mean from `ImportanceCorrection.totals`, of one part or summed over parts; 1 where all weights are 0."""
    total, count = totals.tolist()
    return total / count if total > 0 else 1.0


def mismatch_metrics(old_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor, bound: float) -> dict[str, float]:
    """How far the trainer is from the engine over the mask; packed or padded alike. 0 for an empty mask.

    The KL is of the engine's distribution from the trainer's, its samples being the engine's: `kl` (k1) is unbiased and
    may be negative, `k3` never is. `share_beyond_bound` counts |log-prob difference| > `bound`.
    """
    difference = log_weights(old_logprobs, behavior_logprobs, mask)
    size = difference.abs()
    exponent = difference.clamp(-LOG_WEIGHT_LIMIT, LOG_WEIGHT_LIMIT)
    return {
        "mismatch/abs_logprob_diff": float(masked_mean(size, mask)),
        "mismatch/max": float(size.max()) if size.numel() else 0.0,
        "mismatch/kl": float(masked_mean(-difference, mask)),
        "mismatch/k3": float(masked_mean(exponent.exp() - 1 - exponent, mask)),
        "mismatch/share_beyond_bound": float(masked_mean((size > bound).to(size.dtype), mask)),
    }


def correction_metrics(weights_BT: Tensor, mask_BT: Tensor, cap: float, floor: float | None = None) -> dict[str, float]:
    """Mean weight, and the share of tokens whose weight was cut: at the cap, at the floor, or masked to 0."""
    cut_BT = (weights_BT >= cap) | (weights_BT <= (0.0 if floor is None else floor))
    return {
        "mismatch/correction_mean": float(masked_mean(weights_BT, mask_BT)),
        "mismatch/share_corrected": float(masked_mean(cut_BT.to(weights_BT.dtype), mask_BT)),
    }
