"""Attention as the trainer uses it: causal rows without a mask, and the tree mask of shared prompts."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from apportion.actors.microbatch import MicroBatch, cut
from apportion.batch import Batch
from benchmarks.bench_work import made_up_batch
from benchmarks.gpu.device import GIB, large_gpu, peak_bytes, seconds_of
from benchmarks.gpu.models import SHAPES, free, random_model, shape_for
from benchmarks.gpu.report import Part, Record
from benchmarks.gpu.update import Learner, gradient_error

FLOAT32_BOUND = 1e-4
# bf16 keeps 8 bits: two kernels differ by about 1 % in a hidden state of a model of random weights.
LOGPROB_BOUND, GRADIENT_BOUND = 0.02, 0.05


def batch_for(device: str, shape: str) -> Batch:
    vocabulary = SHAPES[shape]["vocab_size"]
    if device == "cuda":
        return made_up_batch(512, 128, 512, 16, vocabulary=vocabulary)
    return made_up_batch(24, 8, 24, 8, vocabulary=vocabulary)


def micro_batch_tokens(shape: str) -> int:
    if shape == "tiny":
        return 256
    return 8192 if large_gpu() else 2048


def kernels_of(work: Any) -> str:
    """Which of torch's attention kernels `work` calls, by the operator's name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    prefix = "aten::_scaled_dot_product_"
    names = sorted({event.key.removeprefix(prefix) for event in seen.key_averages() if event.key.startswith(prefix)})
    return ", ".join(name for name in names if not name.endswith("_backward")) or "none"


def compare(record: Record, label: str, sides: dict[str, tuple[Learner, list[MicroBatch]]], exact: bool) -> None:
    """The first side against the second, which is the reference: log-probs, loss, gradient, then both sides' time."""
    bounds = (FLOAT32_BOUND, FLOAT32_BOUND) if exact else (LOGPROB_BOUND, GRADIENT_BOUND)
    scores, losses, gradients = [], [], []
    reference, its_micros = list(sides.values())[1]
    reference.drift(its_micros)
    for learner, micros in sides.values():
        scores.append(learner.score(micros))
        loss, found = learner.passes(micros, learner.ours)
        losses.append(loss)
        gradients.append(found)
        learner.module.zero_grad(set_to_none=True)
    gap = float(np.abs(scores[0] - scores[1]).mean())
    record.hold(f"{label}: mean gap of log-probs", gap, bounds[0], "nats")
    record.hold(f"{label}: difference of the losses", abs(losses[0] - losses[1]), bounds[0])
    record.hold(f"{label}: relative error of the gradient", gradient_error(*gradients), bounds[1])
    del gradients
    if exact and record.on_gpu:
        return
    for name, (learner, micros) in sides.items():
        work = partial(learner.passes, micros, learner.ours)
        seconds = seconds_of(work, record.device, repeats=2 if record.on_gpu else 1, warm_up=int(record.on_gpu))
        record.say(f"{label}, {name}: tokens/s", sum(m.real_tokens for m in micros) / seconds, "tokens/s")
        record.say(f"{label}, {name}: kernels", kernels_of(work))
        if record.on_gpu:
            record.say(f"{label}, {name}: peak memory", peak_bytes(work) / GIB, "GiB")


def precisions(record: Record) -> list[tuple[str, torch.dtype, str]]:
    """Shape, type and label of each comparison: float32 shows that it is right, bf16 how it is used."""
    tiny = ("tiny", torch.float32, "float32")
    return [tiny, (shape_for(record.device), torch.bfloat16, "bf16")] if record.on_gpu else [tiny]


def run_causal(record: Record) -> None:
    device = record.device
    for shape, dtype, label in precisions(record):
        batch = batch_for("cpu" if shape == "tiny" else device, shape)
        micros = cut(batch, np.arange(len(batch)), micro_batch_tokens(shape))
        sides = {}
        for attention in ("sdpa", "eager"):
            model = random_model(shape, device, dtype, attention)
            sides[attention] = (Learner(model, batch, device, 512, optimizer=False), micros)
        compare(record, label, sides, label == "float32")
        del sides
        free(device)


def run_tree(record: Record) -> None:
    device = record.device
    for shape, dtype, label in precisions(record):
        batch = batch_for("cpu" if shape == "tiny" else device, shape)
        tokens, every = micro_batch_tokens(shape), np.arange(len(batch))
        learner = Learner(random_model(shape, device, dtype), batch, device, 512, optimizer=False)
        sides = {
            "shared prompts": (learner, cut(batch, every, tokens, share_prompts=True)),
            "rows alone": (learner, cut(batch, every, tokens)),
        }
        compare(record, label, sides, label == "float32")
        del learner, sides
        free(device)


CAUSAL = Part("causal", "sdpa on right-padded rows without a mask against eager attention", run_causal)
TREE = Part("tree", "shared prompts behind a tree mask against rows alone", run_tree)
