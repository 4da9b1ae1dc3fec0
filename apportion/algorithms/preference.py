"""Losses of the preference stages: token NLL, Bradley-Terry, and DPO with its variants. Nothing here divides by a batch.

A loss gives one number a token or a pair; the caller multiplies it by weights that the whole optimiser step was given
at once (`1 / pairs of the step`, or a reduction of `algorithms/reductions`), so that any split into ranks and
micro-batches gives the same update.

Axes: P pair, R answer token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

KINDS = ("sigmoid", "ipo")
TOKEN_LOGPROBS, SEQUENCE_SCORES = "token_logprobs", "sequence_scores"


@dataclass
class PairInput:
    """What a model says of P pairs.

    `chosen_P` and `rejected_P` are sums of the answers' log-probs, or a reward model's scores; only they carry a
    gradient. The reference's sums and the answers' lengths in tokens are there where a loss asks for them.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_lengths_P: Tensor
    rejected_lengths_P: Tensor
    reference_chosen_P: Tensor | None = None
    reference_rejected_P: Tensor | None = None
    wanted_margins_P: Tensor | None = None  # how far apart the data says the two are


@dataclass
class PairOutput:
    """Per-pair loss, not reduced, and by how much the model prefers the chosen answer (detached)."""

    losses_P: Tensor
    margins_P: Tensor


@dataclass
class Sft:
    """Negative log-likelihood of the answers' tokens.

    >>> import torch
    >>> Sft()(torch.tensor([-1.0, -0.5])).tolist()
    [1.0, 0.5]
    """

    name: ClassVar[str] = "sft"
    pairs: ClassVar[bool] = False
    reads: ClassVar[str] = TOKEN_LOGPROBS
    needs_reference: ClassVar[bool] = False

    def __call__(self, logprobs_R: Tensor) -> Tensor:
        return -logprobs_R


@dataclass
class RewardModel:
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected - m) (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

    m is `margin` plus, where the data has one, the pair's own (Touvron et al. 2023, arXiv 2307.09288, eq. 2).
    `center` adds `center * (r_chosen + r_rejected)^2`, which keeps scores around 0 (Eisenstein et al. 2023,
    arXiv 2312.09244); differences are all that the first term sees.

    >>> import torch
    >>> two, one = torch.tensor([2.0]), torch.tensor([1.0])
    >>> round(RewardModel()(PairInput(two, one, one, one)).losses_P.item(), 4)
    0.3133
    """

    name: ClassVar[str] = "reward_model"
    pairs: ClassVar[bool] = True
    reads: ClassVar[str] = SEQUENCE_SCORES
    needs_reference: ClassVar[bool] = False

    margin: float = 0.0
    center: float = 0.0

    def __post_init__(self) -> None:
        for name in ("margin", "center"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")

    def __call__(self, pairs: PairInput) -> PairOutput:
        difference_P = pairs.chosen_P - pairs.rejected_P
        wanted_P = self.margin if pairs.wanted_margins_P is None else self.margin + pairs.wanted_margins_P
        losses_P = -F.logsigmoid(difference_P - wanted_P)
        if self.center > 0:
            losses_P = losses_P + self.center * (pairs.chosen_P + pairs.rejected_P) ** 2
        return PairOutput(losses_P, difference_P.detach())


@dataclass
class Dpo:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    With h = log pi(c)/ref(c) - log pi(r)/ref(r), c the chosen and r the rejected answer:

    - `sigmoid`: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = `label_smoothing` (conservative DPO);
    - `ipo`: (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    `length_normalized` divides each log-ratio by its answer's tokens (Lambert et al. 2024, arXiv 2411.15124).
    `reverse` swaps the roles: the data's rejected answer is the chosen one, in the loss and in every metric.
    The margin is beta h.

    >>> import torch
    >>> n = torch.tensor([2.0])
    >>> pair = PairInput(torch.tensor([-3.0]), torch.tensor([-5.0]), n, n, torch.tensor([-4.0]), torch.tensor([-5.0]))
    >>> round(Dpo(beta=0.1)(pair).losses_P.item(), 4)  # h = 1
    0.6444
    """

    name: ClassVar[str] = "dpo"
    pairs: ClassVar[bool] = True
    reads: ClassVar[str] = TOKEN_LOGPROBS
    needs_reference: ClassVar[bool] = True

    beta: float = 0.1
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalized: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta: got {self.beta}, expected above 0")
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: got {self.label_smoothing}, expected 0 to below 0.5")
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing} with kind={self.kind}, expected kind=sigmoid"
            )

    def __call__(self, pairs: PairInput) -> PairOutput:
        if pairs.reference_chosen_P is None or pairs.reference_rejected_P is None:
            raise ValueError("reference: got none, expected the reference's log-probs of both answers")
        chosen_P = pairs.chosen_P - pairs.reference_chosen_P
        rejected_P = pairs.rejected_P - pairs.reference_rejected_P
        if self.length_normalized:
            chosen_P, rejected_P = chosen_P / pairs.chosen_lengths_P, rejected_P / pairs.rejected_lengths_P
        h_P = rejected_P - chosen_P if self.reverse else chosen_P - rejected_P
        margins_P = (self.beta * h_P).detach()
        if self.kind == "ipo":
            return PairOutput((h_P - 1 / (2 * self.beta)) ** 2, margins_P)
        losses_P = -(1 - self.label_smoothing) * F.logsigmoid(self.beta * h_P)
        if self.label_smoothing:
            losses_P = losses_P - self.label_smoothing * F.logsigmoid(-self.beta * h_P)
        return PairOutput(losses_P, margins_P)


Objective = Sft | RewardModel | Dpo


def share_correct(margins_P: Tensor) -> Tensor:
    """[P] 1 where the chosen answer is preferred, 0 where the other one is, 0.5 for a tie."""
    return (margins_P > 0).double() + 0.5 * (margins_P == 0).double()
