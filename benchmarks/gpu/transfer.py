"""Tensors on their way to another process and to the host: CUDA IPC, and the host path of a weight sync."""

from __future__ import annotations

import queue
import time
from typing import Any

import numpy as np
import torch

from apportion.platform.weights import WeightBundle, as_bytes, checksum
from benchmarks.gpu.device import finish, seconds_of
from benchmarks.gpu.models import random_model
from benchmarks.gpu.report import Part, Record, Skipped

WAIT_SECONDS = 60.0  # for the other process: its start and its imports
PATTERN = 251  # the tensor that is handed over counts modulo this prime


def receiver(device: str, count: int, inbox: Any, outbox: Any) -> None:
    """The other process: open the tensor, copy it, compare it with what it should be."""
    finish(device)
    outbox.put("ready")
    start = time.perf_counter()
    shared = inbox.get(timeout=WAIT_SECONDS)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    copied = shared.clone()
    finish(device)
    seconds = time.perf_counter() - start
    wrong = 0
    for place in range(0, count, 2**26):
        part = copied[place : place + 2**26]
        wanted = (torch.arange(place, place + len(part), device=device) % PATTERN).to(torch.uint8)
        wrong += int((part != wanted).sum())
    del shared
    outbox.put((wrong, opened, seconds))


def run_ipc(record: Record) -> None:
    from torch import multiprocessing

    device = record.device
    count = 3_000_000_000 if record.on_gpu else 30_000_000
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=receiver, args=(device, count, inbox, outbox), daemon=True)
    process.start()
    try:
        tensor = torch.empty(count, dtype=torch.uint8, device=device)
        for place in range(0, count, 2**26):
            part = tensor[place : place + 2**26]
            part.copy_(torch.arange(place, place + len(part), device=device) % PATTERN)
        finish(device)
        _answer(process, outbox)
        start = time.perf_counter()
        inbox.put(tensor)
        wrong, opened, copied = _answer(process, outbox)
        total = time.perf_counter() - start
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
    record.hold("bytes that differ in the other process", wrong, 0)
    record.say(f"seconds to hand over and open {count / 1e9:g} GB", opened, "s")
    record.say("copy within the other process", count / copied / 1e9, "GB/s")
    record.say("seconds with the comparison", total, "s")


def _answer(process: Any, outbox: Any) -> Any:
    """The other process's next message; RuntimeError where it died or is late."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            return outbox.get(timeout=0.5)
        except queue.Empty:
            if not process.is_alive():
                raise RuntimeError(f"the other process ended with exit code {process.exitcode}") from None
    raise RuntimeError(f"the other process did not answer within {WAIT_SECONDS:g} s")


def run_host(record: Record) -> None:
    """Copies alone; `checksums` adds the proof."""
    device = record.device
    model = random_model("1.5B" if record.on_gpu else "tiny", device)
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    size = sum(p.nbytes for _, p in named)
    record.say("weights", size / 1e9, "GB")
    parts: list[np.ndarray] = []

    def to_host() -> None:
        parts[:] = [as_bytes(p) for _, p in named]

    record.say("device to host, tensor by tensor", size / seconds_of(to_host, device) / 1e9, "GB/s")
    room = np.concatenate(parts)
    seconds = seconds_of(lambda: np.concatenate(parts, out=room), device)
    record.say("pack into one buffer", size / seconds / 1e9, "GB/s")
    flat = torch.from_numpy(room)
    back: list[torch.Tensor] = []

    def to_device() -> None:
        back[:] = [flat.to(device, copy=True)]

    record.say("host to device, one buffer", size / seconds_of(to_device, device) / 1e9, "GB/s")
    wrong, offset = 0, 0
    for _, parameter in named:
        raw = back[0][offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        wrong += int((raw != parameter).sum())
        offset += parameter.nbytes
    record.hold("values that differ after both ways", wrong, 0)


def run_checksums(record: Record) -> None:
    try:
        import xxhash  # noqa: F401
    except ImportError as error:
        raise Skipped("needs the package xxhash") from error
    device = record.device
    model = random_model("1.5B" if record.on_gpu else "tiny", device)
    parameters = [(name, p.detach()) for name, p in model.named_parameters()]
    bundle = WeightBundle.pack(parameters, 0)
    record.hold("tensors whose checksum differs after packing", len(bundle.verify()), 0)
    seconds = seconds_of(lambda: checksum(bundle.data), device)
    record.say("xxh3 of host memory", bundle.nbytes / seconds / 1e9, "GB/s")
    seconds = seconds_of(lambda: WeightBundle.pack(parameters, 0, bundle.data), device)
    record.say("copy, checksum and pack, as a sync does", bundle.nbytes / seconds / 1e9, "GB/s")


IPC = Part("ipc", "a tensor handed to another process", run_ipc)
HOST = Part("host_path", "weights through host memory, as a sync copies them today", run_host)
CHECKSUMS = Part("checksums", "checksums of weights on the host", run_checksums)
