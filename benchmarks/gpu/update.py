"""The policy's loss path without DeepSpeed against what a person would write for one model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.actors.microbatch import MicroBatch, cut
from apportion.actors.modules import CausalLMLogprobs
from apportion.algorithms import registry
from apportion.algorithms.interface import SurrogateInput
from apportion.batch import Batch
from benchmarks.bench_work import made_up_batch
from benchmarks.gpu.device import GIB, large_gpu, matmul_flops, peak_bytes, seconds_of, stated_flops
from benchmarks.gpu.models import SHAPES, free, model_flops, random_model
from benchmarks.gpu.report import Part, Record

SURROGATE = {"name": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "ratio": "token"}
GRADIENT_BOUND = 0.02  # of the gradient's norm: bf16 gradients added up in another order
LOSS_BOUND = 1e-3
Loss = Callable[[MicroBatch], Tensor]


class Learner:
    """One model with float32 masters and AdamW, and two losses over the same micro-batches."""

    def __init__(self, model: Any, batch: Batch, device: str, chunk: int, optimizer: bool = True) -> None:
        self.module = CausalLMLogprobs(model, chunk)
        self.batch, self.device = batch, device
        self._surrogate = registry.build("surrogate", SURROGATE)
        self._parameters = list(model.parameters())
        self._masters: list[Tensor] = []
        if optimizer:
            self._masters = [p.detach().float().clone().requires_grad_() for p in self._parameters]
            on_gpu = device == "cuda"
            self._optimizer = torch.optim.AdamW(self._masters, lr=1e-6, fused=on_gpu, foreach=not on_gpu)

    def score(self, micros: list[MicroBatch]) -> np.ndarray:
        """Log-probs on the batch's packed axis."""
        out = np.zeros(int(self.batch.response_lengths.sum()), np.float32)
        with torch.no_grad():
            for micro in micros:
                at = micro.to(self.device)
                found, _ = self.module(at.input_ids, at.rows, at.columns, at.targets, tree=at.layout)
                out[micro.packed_index] = found.cpu().numpy()
        return out

    def drift(self, micros: list[MicroBatch]) -> None:
        """Give the batch old log-probs near the model's own: ratios differ from 1, and one in eight is clipped. None is so
        near a clip's edge that rounding decides."""
        rng, count = np.random.default_rng(6), int(self.batch.response_lengths.sum())
        noise = np.where(rng.random(count) < 1 / 8, rng.choice([-0.5, 0.5], count), rng.uniform(-0.1, 0.1, count))
        self.batch.old_logprobs = self.score(micros) + noise.astype(np.float32)

    def ours(self, micro: MicroBatch) -> Tensor:
        """The loss as a policy rank makes it."""
        logprobs, _ = self.module(micro.input_ids, micro.rows, micro.columns, micro.targets, tree=micro.layout)
        policy = micro.spread(logprobs)
        advantages, weights = (self._gather(micro, name) for name in ("advantages", "loss_weights"))
        out = self._surrogate(SurrogateInput(policy, self._gather(micro, "old_logprobs"), advantages, micro.mask))
        return (out.losses_BT * weights).sum()

    def bare(self, micro: MicroBatch) -> Tensor:
        """The same loss in plain torch: logits of all response positions at once."""
        model = self.module.model
        hidden = model.model(input_ids=micro.input_ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[micro.rows, micro.columns]).float()
        logprobs = torch.log_softmax(logits, -1).gather(-1, micro.targets[:, None]).squeeze(-1)
        old, advantages, weights = (
            torch.from_numpy(getattr(self.batch, name)[micro.packed_index]).to(self.device)
            for name in ("old_logprobs", "advantages", "loss_weights")
        )
        ratio = (logprobs - old).exp()
        return (torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * weights).sum()

    def _gather(self, micro: MicroBatch, name: str) -> Tensor:
        return micro.gather(getattr(self.batch, name), self.device)

    def passes(self, micros: list[MicroBatch], loss: Loss) -> tuple[float, list[Tensor]]:
        """Loss and gradients of one batch."""
        self.module.zero_grad(set_to_none=True)
        total = 0.0
        for micro in micros:
            value = loss(micro.to(self.device))
            value.backward()
            total += float(value.detach())
        return total, [p.grad.detach().clone() for p in self._parameters]

    def update(self, micros: list[MicroBatch], loss: Loss) -> None:
        """One optimizer step."""
        for micro in micros:
            loss(micro.to(self.device)).backward()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0, foreach=True)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)


def gradient_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative error over all parameters together; tensor by tensor, since a float32 copy of all would not fit."""
    off = sum(float((f.float() - w.float()).square().sum()) for f, w in zip(found, wanted, strict=True))
    return (off / sum(float(w.float().square().sum()) for w in wanted)) ** 0.5


def made_micros(device: str, shape: str) -> tuple[Batch, list[MicroBatch]]:
    """A batch with prompts and responses of different lengths, and its micro-batches."""
    vocabulary = SHAPES[shape]["vocab_size"]
    if device == "cpu":
        batch, tokens = made_up_batch(16, 8, 24, 8, vocabulary=vocabulary), 256
    else:
        batch = made_up_batch(256, 256, 768, 32, vocabulary=vocabulary)
        tokens = 8192 if large_gpu() else 2048
    return batch, cut(batch, np.arange(len(batch)), tokens)


def measure(record: Record, shape: str, checkpointing: bool, flops: tuple[float, float | None]) -> None:
    """One model: the same loss and gradient, then tokens/s, utilization and peak memory of both losses."""
    device = record.device
    batch, micros = made_micros(device, shape)
    model = random_model(shape, device, checkpointing=checkpointing)
    learner = Learner(model, batch, device, 4096 if record.on_gpu else 512)
    name = f"{shape}{', checkpointing' if checkpointing else ''}"
    learner.drift(micros)
    ours, our_gradients = learner.passes(micros, learner.ours)
    bare, bare_gradients = learner.passes(micros, learner.bare)
    record.hold(f"{name}: difference of the losses", abs(ours - bare), LOSS_BOUND)
    error = gradient_error(our_gradients, bare_gradients)
    record.hold(f"{name}: relative error of the gradient", error, GRADIENT_BOUND)
    del our_gradients, bare_gradients
    learner.module.zero_grad(set_to_none=True)
    free(device)
    tokens = sum(micro.real_tokens for micro in micros)
    work = model_flops(model, tokens, tokens / len(batch))
    measured, stated = flops
    for side, loss in (("ours", learner.ours), ("bare torch", learner.bare)):
        update = partial(learner.update, micros, loss)
        seconds = seconds_of(update, device, repeats=2 if record.on_gpu else 1, warm_up=int(record.on_gpu))
        record.say(f"{name}, {side}: tokens/s", tokens / seconds, "tokens/s")
        record.say(f"{name}, {side}: share of the measured matmul rate", work / seconds / measured)
        if stated is not None:
            record.say(f"{name}, {side}: model FLOP utilization", work / seconds / stated)
        if record.on_gpu:
            record.say(f"{name}, {side}: peak memory beyond the states", peak_bytes(update) / GIB, "GiB")


def run(record: Record) -> None:
    stated = stated_flops(torch.cuda.get_device_name(0)) if record.on_gpu else None
    flops = matmul_flops(record.device), stated
    record.say("bf16 matrix product", flops[0] / 1e12, "TFLOP/s")
    cases = [("tiny", False), ("tiny", True)]
    if record.on_gpu:
        cases = [("0.5B", False), ("0.5B", True)]
        if large_gpu():
            cases.append(("1.5B", True))
    for shape, checkpointing in cases:
        measure(record, shape, checkpointing, flops)
        free(record.device)


PART = Part("update", "policy update against a bare torch loop", run, 180)
