"""The chunked output head against full logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.actors.plain_head import PlainHeadLogprobs
from benchmarks.gpu.device import GIB, finish, large_gpu, largest_gap, peak_bytes, relative_error, seconds_of
from benchmarks.gpu.models import SHAPES, free
from benchmarks.gpu.report import Part, Record

CHUNKS = (512, 4096)
FLOAT32_BOUND = 1e-4  # sums of up to 150,000 terms in another order
# bf16 rounds a logit by up to 2^-9 of its size, and kernels for other shapes round other sums.
LOGPROB_BOUND, GRADIENT_BOUND = 0.05, 0.02
TEMPERATURE = 0.7


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, with all logits at once and autograd's own backward pass."""
    logits = torch.nn.functional.linear(hidden, weight).float() * factor
    scores = torch.log_softmax(logits, -1)
    entropies = -(scores.exp() * scores).sum(-1).detach()
    return scores.gather(-1, targets[:, None]).squeeze(-1), entropies


def inputs(rows: int, shape: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [r, D], weight [V, D], targets [r], a weight for each log-prob [r]."""
    sizes = SHAPES[shape]
    width, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    torch.manual_seed(1)
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    return hidden, weight, targets, torch.randn(rows, device=device) / rows


def gradients(logprobs: Tensor, factors: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    for_hidden, for_weight = torch.autograd.grad((logprobs * factors).sum(), (hidden, weight))
    return for_hidden, for_weight


def compare(record: Record, label: str, given: tuple[Tensor, ...], bounds: tuple[float, float]) -> None:
    """Log-probs, entropies and gradients of each chunk size against full logits."""
    hidden, weight, targets, factors = given
    wanted, entropies = full_logits(hidden, weight, targets, 1 / TEMPERATURE)
    wanted_gradients = gradients(wanted, factors, hidden, weight)
    for chunk in CHUNKS:
        got, got_entropies, _ = PlainHeadLogprobs.apply(hidden, weight, targets, 1 / TEMPERATURE, chunk)
        record.hold(f"{label}, chunk {chunk}: largest gap of log-probs", largest_gap(got, wanted), bounds[0], "nats")
        gap = largest_gap(got_entropies, entropies)
        record.hold(f"{label}, chunk {chunk}: largest gap of entropies", gap, bounds[0], "nats")
        found = gradients(got, factors, hidden, weight)
        for name, value, reference in zip(("hidden states", "head"), found, wanted_gradients, strict=True):
            error = relative_error(value, reference)
            record.hold(f"{label}, chunk {chunk}: relative error of the gradient, {name}", error, bounds[1])


def run(record: Record) -> None:
    device = record.device
    shape, rows = ("tiny", 1100)
    if record.on_gpu:
        shape, rows = "1.5B", 8192 if large_gpu() else 2048
    small = inputs(rows // 2 if shape == "tiny" else 1024, shape, device, torch.float32)
    compare(record, "float32", small, (FLOAT32_BOUND, FLOAT32_BOUND))
    del small
    free(device)
    hidden, weight, targets, factors = inputs(rows, shape, device, torch.bfloat16)
    compare(record, "bf16", (hidden, weight, targets, factors), (LOGPROB_BOUND, GRADIENT_BOUND))
    free(device)

    def chunked(chunk: int) -> Any:
        out = PlainHeadLogprobs.apply(hidden, weight, targets, 1 / TEMPERATURE, chunk)[0]
        return gradients(out, factors, hidden, weight)

    def whole() -> Any:
        return gradients(full_logits(hidden, weight, targets, 1 / TEMPERATURE)[0], factors, hidden, weight)

    for name, work in (*((f"chunk {c}", lambda c=c: chunked(c)) for c in CHUNKS), ("full logits", whole)):
        record.say(
            f"bf16, {name}: ms for {rows} tokens, both passes",
            1000 * seconds_of(work, device, repeats=3 if record.on_gpu else 1),
            "ms",
        )
        if record.on_gpu:
            record.say(f"bf16, {name}: peak memory", peak_bytes(work) / GIB, "GiB")
    finish(device)


PART = Part("head", "chunked output head against full logits", run)
