"""Log-probs of chosen tokens under an output head that is one matrix, with a backward pass of its own.

Autograd would keep or make anew, for each chunk, four float32 tensors of [tokens x vocabulary]; this makes one and works
in it. The gradient of log p(y) with respect to the logits is onehot(y) - p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PlainHeadLogprobs(torch.autograd.Function):
    """(hidden [r, D], weight [V, D], targets [r], factor, chunk) to log-probs, entropies, logsumexp, float32 [r] each.

    Logits are hidden @ weight.T * factor. Only log-probs have a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, factor: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropies, normalizers = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, factor)
            normalizers[part] = torch.logsumexp(logits, -1)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normalizers[part]
            chances = (logits - normalizers[part, None]).exp_()
            entropies[part] = normalizers[part] - chances.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.factor, ctx.chunk = factor, chunk
        ctx.mark_non_differentiable(entropies, normalizers)
        return logprobs, entropies, normalizers

    @staticmethod
    def backward(ctx: Any, grads: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        for_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            scaled = (grads[part] * ctx.factor)[:, None]
            errors = _logits(hidden[part], weight, ctx.factor).sub_(normalizers[part, None]).exp_().mul_(-scaled)
            errors = errors.scatter_add_(-1, targets[part, None], scaled).to(weight.dtype)
            if for_hidden is not None:
                for_hidden[part] = errors @ weight
            if for_weight is not None:
                for_weight.addmm_(errors.T, hidden[part])
        return for_hidden, for_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor, factor: float) -> Tensor:
    """float32 [c, V], a tensor of its own."""
    logits = nn.functional.linear(hidden, weight).float()
    return logits if factor == 1.0 else logits.mul_(factor)


def plain_weight(head: nn.Module) -> Tensor | None:
    """The matrix of a head that is nothing else. Within a forward pass of ZeRO-3, reading it is what gathers it."""
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    return head.weight
