"""What the GPU is and what a process pays for using it."""

from __future__ import annotations

import torch

from benchmarks.gpu.device import GIB, driver
from benchmarks.gpu.report import Part, Record, Skipped


def run(record: Record) -> None:
    if not record.on_gpu:
        raise Skipped("needs a GPU")
    before = driver().get("used_mib")  # before this process has a CUDA context
    free_bytes, total = torch.cuda.mem_get_info()
    used = (total - free_bytes - torch.cuda.memory_reserved()) / GIB
    if before is None:
        record.say("in use with a fresh CUDA context, other processes' included", used, "GiB")
    else:
        record.say("in use by other processes", before / 1024, "GiB")
        record.say("a fresh CUDA context", used - before / 1024, "GiB")
    size = 4096
    left = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    (left @ left).sum().item()
    free_bytes, _ = torch.cuda.mem_get_info()
    loaded = (total - free_bytes - torch.cuda.memory_reserved()) / GIB
    record.say("the context with matrix kernels loaded, beyond a fresh one", loaded - used, "GiB")
    record.say("memory that CUDA reports", total / GIB, "GiB")
    capability = torch.cuda.get_device_capability(0)
    record.say("compute capability", f"{capability[0]}.{capability[1]}")
    record.say("bf16 in hardware", "yes" if capability >= (8, 0) else "no")
    count = torch.cuda.device_count()
    if count == 1:
        record.say("peer access", "one GPU")
        return
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    direct = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
    record.say("peer access", f"{direct} of {len(pairs)} pairs")
    record.say("GPU 0 to GPU 1", _copy_rate(), "GB/s")


def _copy_rate() -> float:
    """Between the first two GPUs: above 40 GB/s it is NVLink."""
    from benchmarks.gpu.device import seconds_of

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize(1)

    return source.nbytes / seconds_of(copy, "cuda") / 1e9


PART = Part("device", "the GPU, its context's memory, peers", run)
