"""Fused AdamW against foreach, and optimizer states on their way to pinned host memory and back."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.device import GIB, finish, largest_gap, peak_bytes, seconds_of
from benchmarks.gpu.models import free
from benchmarks.gpu.report import Part, Record, Skipped

RATE = 1e-3
STEPS = 3
STEP_BOUND = 1e-6  # a thousandth of a step of AdamW at this rate
MOVED_BYTES = 28  # a parameter and step: reads weight, gradient and two moments, writes weight and moments, in float32


def flat_state(count: int, device: str, fused: bool) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    """One flat parameter as ZeRO holds it, the same numbers every time."""
    torch.manual_seed(2)
    parameter = torch.nn.Parameter(torch.randn(count, device=device) * 0.02)
    parameter.grad = torch.randn(count, device=device) * 1e-3
    optimizer = torch.optim.AdamW([parameter], lr=RATE, betas=(0.9, 0.95), fused=fused, foreach=not fused)
    return parameter, optimizer


def run_adam(record: Record) -> None:
    count, device = (500_000_000 if record.on_gpu else 2_000_000), record.device
    results = {}
    for name, fused in (("fused", True), ("foreach", False)):
        parameter, optimizer = flat_state(count, device, fused)
        for _ in range(STEPS):
            optimizer.step()
        results[name] = parameter.detach().to("cpu", copy=True)
        seconds = seconds_of(optimizer.step, device)
        record.say(f"{name}: ms a step of {count / 1e6:g} million parameters", 1000 * seconds, "ms")
        record.say(f"{name}: GB/s of the {MOVED_BYTES} bytes a parameter", MOVED_BYTES * count / seconds / 1e9, "GB/s")
        if record.on_gpu:
            record.say(f"{name}: peak memory beyond the states", peak_bytes(optimizer.step) / GIB, "GiB")
        del parameter, optimizer
        free(device)
    gap = largest_gap(results["fused"], results["foreach"])
    record.hold(f"largest difference of a weight after {STEPS} steps of {RATE:g}", gap, STEP_BOUND)


def run_offload(record: Record) -> None:
    if not record.on_gpu:
        raise Skipped("needs a GPU: pinned host memory is for copies to one")
    count = 1_000_000_000  # 4 GB: the two moments of half a billion parameters
    states = torch.randn(count, device="cuda")
    start = time.perf_counter()
    host = torch.empty(count, pin_memory=True)
    record.say("seconds to pin 4 GB", time.perf_counter() - start, "s")
    pageable = torch.empty(count)
    for name, room in (("pinned", host), ("pageable", pageable)):
        out = seconds_of(partial(room.copy_, states, non_blocking=True), "cuda")
        back = torch.empty_like(states)
        into = seconds_of(partial(back.copy_, room, non_blocking=True), "cuda")
        record.say(f"{name}: device to host", 4 * count / out / 1e9, "GB/s")
        record.say(f"{name}: host to device", 4 * count / into / 1e9, "GB/s")
        finish("cuda")
        record.hold(f"{name}: values that differ after both ways", _differing(states, back), 0)
        del back


def _differing(left: Any, right: Any) -> float:
    return float((left != right).sum())


ADAM = Part("adam", "fused AdamW against foreach", run_adam)
OFFLOAD = Part("offload", "optimizer states to pinned host memory and back", run_offload)
