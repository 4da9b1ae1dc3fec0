"""Measured memory of a training rank against the estimate of `apportion plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from apportion.actors.modules import CausalLMLogprobs
from benchmarks.gpu.device import GIB, large_gpu
from benchmarks.gpu.estimate import training_bytes
from benchmarks.gpu.models import SHAPES, free, random_model
from benchmarks.gpu.report import Part, Record

# Weights, masters, moments and gradients follow from the number of parameters: an estimate is right to within this.
STATE_BOUND = 0.02
STATES = ("weights", "masters", "moments", "gradients")


class Watch:
    """Bytes that live on the device: from torch's allocator, or on a CPU from the tensors that are named."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._last = self._now()

    def _now(self) -> int:
        if not self._on_gpu:
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def grown(self, tensors: list[torch.Tensor]) -> int:
        """Bytes since the last call; `tensors` are what should have made them."""
        before, self._last = self._last, self._now()
        return self._last - before if self._on_gpu else sum(t.nbytes for t in tensors)


def kept_bytes(work: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What `work` gives, and the bytes that autograd keeps for its backward pass beside the parameters."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = work()
    return out, sum(kept.values())


def measured_states(shape: str, device: str) -> tuple[dict[str, int], Any]:
    """Bytes of weights, masters, gradients and moments, made one after the other, and the model."""
    free(device)
    watch = Watch(device)
    model = random_model(shape, device)
    parameters = list(model.parameters())
    free(device)
    measured = {"weights": watch.grown(parameters)}
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    measured["masters"] = watch.grown(masters)
    for master in masters:
        master.grad = torch.zeros_like(master)
    measured["gradients"] = watch.grown([m.grad for m in masters if m.grad is not None])
    optimizer = torch.optim.AdamW(masters, fused=device == "cuda", foreach=device != "cuda")
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    measured["moments"] = watch.grown(moments)
    return measured, model


def measured_passes(model: Any, shape: str, device: str, tokens: int, chunk: int) -> dict[str, int]:
    """Bytes kept for the backward pass of one micro-batch, and on a GPU the peaks of the passes and of the head."""
    module = CausalLMLogprobs(model, chunk)
    torch.manual_seed(4)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (1, tokens), device=device)
    columns = torch.arange(tokens - 1, device=device)
    parameters = list(model.parameters())
    measured: dict[str, int] = {}
    hidden, measured["activations, kept"] = kept_bytes(lambda: module.hidden(ids)[0, columns], parameters)
    if device != "cuda":
        return measured
    del hidden
    model.zero_grad(set_to_none=True)
    free(device)

    def peak(work: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    for parameter in parameters:  # bf16 gradients are states, not activations
        parameter.grad = torch.zeros_like(parameter)
    measured["activations"] = peak(lambda: module.hidden(ids)[0, columns].sum().backward())
    picked = torch.randn(len(columns), model.config.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    measured["logits"] = peak(lambda: module.chosen(picked, ids[0, 1:], 1.0)[0].sum().backward())
    for parameter in parameters:
        parameter.grad = None
    return measured


def run(record: Record) -> None:
    device = record.device
    shapes, tokens, chunk = (("0.5B", "1.5B"), 2048, 4096) if record.on_gpu else (("tiny",), 256, 128)
    if record.on_gpu and not large_gpu():
        shapes = shapes[:1]
    for shape in shapes:
        measured, model = measured_states(shape, device)
        estimated = training_bytes(shape, tokens, chunk, False)
        for name in STATES:
            record.say(f"{shape}, {name}: measured", measured[name] / GIB, "GiB")
            gap = abs(estimated[name] - measured[name]) / measured[name]
            record.hold(f"{shape}, {name}: share that the estimate is off", gap, STATE_BOUND)
        for checkpointing in (False, True):
            label = f"{shape}, {tokens} tokens{', checkpointing' if checkpointing else ''}"
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            free(device)
            found = measured_passes(model, shape, device, tokens, chunk)
            estimated = training_bytes(shape, tokens, chunk, checkpointing)
            for name, value in found.items():
                record.say(f"{label}, {name}: measured", value / GIB, "GiB")
                purpose = name.partition(",")[0]
                record.say(f"{label}, {name}: estimate / measured", estimated[purpose] / value)
        unknown = sorted(set(estimated) - {*STATES, "activations", "logits"})
        if unknown:
            record.say(f"{shape}: purposes of the estimate that are not measured here", ", ".join(unknown))
        del model
        free(device)


PART = Part("memory", "measured memory against the plan's estimate", run)
