"""The only place that divides: from the mask of one whole optimiser step to one weight a token.

The loss of the step is sum(weights * token losses), so ranks and micro-batches only add up. Every reduction is given
the mask of all trajectories of the step, on every rank. A row without a True counts for nothing, so that padding a
batch with empty rows changes nothing; a mask without any gives weights of 0. Weights are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def _rows(mask_BT: Tensor) -> Tensor:
    """How many rows have a token, at least 1. Scalar float64."""
    return mask_BT.any(-1).sum().clamp_min(1).double()


@dataclass
class TokenMean:
    """Mean over all tokens of the step (DAPO, PPO): long responses weigh more.

    >>> import torch
    >>> TokenMean()(torch.tensor([[True, True], [True, False]])).tolist()[1]
    [0.3333333333333333, 0.0]
    """

    def __call__(self, mask_BT: Tensor) -> Tensor:
        return mask_BT.double() / mask_BT.sum().clamp_min(1)


@dataclass
class SequenceMean:
    """Mean over trajectories of the mean over their tokens (the GRPO paper's): every response weighs the same.

    >>> import torch
    >>> SequenceMean()(torch.tensor([[True, True], [True, False]])).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """

    def __call__(self, mask_BT: Tensor) -> Tensor:
        lengths_B1 = mask_BT.sum(-1, keepdim=True).clamp_min(1)
        return mask_BT.double() / lengths_B1 / _rows(mask_BT)


@dataclass
class SequenceSum:
    """Mean over trajectories of the sum over their tokens (sequence-level policy gradients, RLOO).

    >>> import torch
    >>> SequenceSum()(torch.tensor([[True, True], [True, False]])).tolist()
    [[0.5, 0.5], [0.5, 0.0]]
    """

    def __call__(self, mask_BT: Tensor) -> Tensor:
        return mask_BT.double() / _rows(mask_BT)


@dataclass
class ConstantNorm:
    """Sum over tokens by trajectories times a constant length (Dr.GRPO, Liu et al. 2025, arXiv 2503.20783).

    The constant is the generation limit, not what the batch happens to hold, so no length is favoured.
    """

    length: int  # L_max, tokens

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length: got {self.length}, expected the response limit in tokens, at least 1")

    def __call__(self, mask_BT: Tensor) -> Tensor:
        return mask_BT.double() / (_rows(mask_BT) * self.length)
