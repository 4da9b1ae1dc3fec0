"""AlignDistil: distillation towards a mix of a DPO model and its opposite, told token by token how far to go (arXiv
2503.02832, eq. 10 to 19). A loss, not a credit: it needs three distributions over the whole vocabulary.

With z the logits of the DPO model, z' those of the other frozen model (reverse DPO, or the reference), at a position:

    D = 1/2 sum_v |softmax(z) - softmax(z')|                        total variation, 0 to 1
    alpha = scale * D + offset,   beta = beta0 / alpha              `fixed`: beta is given, alpha = beta0 / beta
    z* = z + alpha (z - z')       contrast                          z' + alpha (z - z')   `interpolate` (theorem 1)
    loss = beta * KL(softmax(student / T) || softmax(z* / T))       reverse KL, full vocabulary; no factor T^2

The gradient flows through the student's softmax alone. The paper's objective is the mean over a response's tokens,
then over responses: `reductions.SequenceMean`. The released code leaves out the 1/2 of D: its 15 is `scale: 30` here.
Where both models agree, alpha is `offset` and beta is at its largest: `weight_cap` bounds it, `extrapolation_cap`
bounds alpha.

The position that predicts a response's first token is the last of its prompt. Only these positions go in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # final hidden states [n, D] to logits [n, V]

VARIANTS = {
    # name: (what z* starts from, whether alpha follows the total variation)
    "aligndistil": ("dpo", True),
    "theorem1_contrast": ("dpo", False),
    "theorem1": ("other", False),
    "theorem1_adaptive": ("other", True),
}


@dataclass
class DistillationOutput:
    """One number for each position, not reduced; only `losses` carries a gradient."""

    losses: Tensor
    kl: Tensor
    total_variation: Tensor
    alpha: Tensor
    weight: Tensor  # beta_t

    @property
    def indicators(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "losses"}


@torch.no_grad()
def total_variation(first_logits: Tensor, second_logits: Tensor) -> Tensor:
    """1/2 sum |softmax - softmax| over the last axis, without a gradient.

    >>> float(total_variation(torch.tensor([0.0, -1e9]), torch.tensor([-1e9, 0.0])))
    1.0
    """
    return first_logits.softmax(-1).sub_(second_logits.softmax(-1)).abs_().sum(-1) / 2


class _ReverseKl(torch.autograd.Function):
    """KL(softmax(first) || softmax(second)) over the last axis. The gradient at the first logits is p (log p - log q -
    KL); autograd would keep five tensors of their size for it, this keeps two."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        gaps = student_logits.log_softmax(-1)
        chances = gaps.exp()
        gaps -= teacher_logits.log_softmax(-1)
        divergence = (chances * gaps).sum(-1)
        ctx.save_for_backward(chances, gaps, divergence)
        return divergence

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None]:
        chances, gaps, divergence = ctx.saved_tensors
        return (gaps - divergence[..., None]).mul_(chances).mul_(grads[..., None]), None


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) over the last axis, differentiable in the student."""
    if temperature != 1:  # a pass over the vocabulary that is worth saving
        student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    return _ReverseKl.apply(student_logits, teacher_logits.detach())


@dataclass
class AlignDistil:
    """The loss of each position. `variant`: `aligndistil`; `theorem1` (a reference as the other model, alpha fixed at
    beta0 / beta), `theorem1_contrast` (reverse DPO, alpha fixed), `theorem1_adaptive` (a reference, alpha adaptive).

    `scale` and `offset` make alpha from the total variation; `beta` is of the fixed variants alone.
    """

    variant: str = "aligndistil"
    beta0: float = 0.1
    scale: float = 30.0
    offset: float = 1e-3
    beta: float = 0.08
    temperature: float = 1.0
    extrapolation_cap: float | None = None  # largest alpha
    weight_cap: float | None = None  # largest beta_t
    chunk_tokens: int = 512  # positions whose logits exist at a time
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: got {self.variant!r}, expected one of {', '.join(VARIANTS)}")
        for name in ("beta0", "scale", "offset", "beta", "temperature", "extrapolation_cap", "weight_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: got {value}, expected above 0")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: got {self.chunk_tokens}, expected at least 1")

    @property
    def other_model(self) -> str:
        """Which frozen model stands beside the DPO model: `reverse_dpo` or `reference`."""
        return "reverse_dpo" if VARIANTS[self.variant][0] == "dpo" else "reference"

    def losses(
        self, student_logits: Tensor, dpo_logits: Tensor, other_logits: Tensor, variation: Tensor | None = None
    ) -> DistillationOutput:
        """Everything [...] for logits [..., V]; softmax in float32 or better. ValueError for unlike vocabularies.

        `variation` [...] of the two teachers saves two passes over the vocabulary where it is known already.
        """
        widths = [x.shape[-1] for x in (student_logits, dpo_logits, other_logits)]
        if len(set(widths)) > 1:
            raise ValueError(
                f"logits: got vocabularies of {widths[0]} (student), {widths[1]} (dpo) and {widths[2]} "
                f"({self.other_model}), expected the same; the teachers need the student's tokenizer"
            )
        with torch.no_grad():
            dpo, other = _precise(dpo_logits.detach()), _precise(other_logits.detach())
            variation = total_variation(dpo, other) if variation is None else variation
            alpha = self._alpha(variation)
            weight = self.beta0 / alpha
            if self.weight_cap is not None:
                weight = weight.clamp_max(self.weight_cap)
            start = dpo if VARIANTS[self.variant][0] == "dpo" else other
            teacher = (dpo - other).mul_(alpha[..., None]).add_(start)
        kl = reverse_kl(_precise(student_logits), teacher, self.temperature)
        return DistillationOutput(weight * kl, kl.detach(), variation, alpha, weight)

    def _alpha(self, variation: Tensor) -> Tensor:
        if VARIANTS[self.variant][1]:
            alpha = self.scale * variation + self.offset
        else:
            alpha = torch.full_like(variation, self.beta0 / self.beta)
        return alpha if self.extrapolation_cap is None else alpha.clamp_max(self.extrapolation_cap)

    def losses_in_chunks(
        self,
        student_hidden_ND: Tensor,
        dpo_hidden_ND: Tensor,
        other_hidden_ND: Tensor,
        heads: tuple[Head, Head, Head],
    ) -> DistillationOutput:
        """The same from final hidden states of N positions and the three output heads (student, dpo, other).

        Logits exist for `chunk_tokens` positions at a time, forward and (made once more, but for the last) backward:
        memory holds N x D and chunk x V, never N x V. Gradients reach the student's hidden states and its head's parameters.
        """
        lengths = [len(x) for x in (student_hidden_ND, dpo_hidden_ND, other_hidden_ND)]
        if len(set(lengths)) > 1:
            raise ValueError(f"hidden states: got {lengths} positions (student, dpo, other), expected the same number")
        student_head, dpo_head, other_head = heads

        def chunk(student: Tensor, dpo: Tensor, other: Tensor, known: list[Tensor]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                dpo_logits, other_logits = dpo_head(dpo), other_head(other)
            out = self.losses(student_head(student), dpo_logits, other_logits, *known)
            known[:] = [out.total_variation]
            return tuple(getattr(out, f.name) for f in fields(out))

        split = [x.split(self.chunk_tokens) for x in (student_hidden_ND, dpo_hidden_ND, other_hidden_ND)]
        *first, last = zip(*split, strict=True)
        parts = [checkpoint(chunk, *pieces, [], use_reentrant=False, preserve_rng_state=False) for pieces in first]
        student, dpo, other = last
        parts.append(chunk(student, dpo, other, []))  # the backward pass begins with it, so what it keeps stands alone
        return DistillationOutput(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
