"""The GPUs that CUDA shows this process, asked without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device, as CUDA describes it."""

    name: str
    memory_bytes: int  # that CUDA reports: less than what the card is sold with
    capability: tuple[int, int]  # compute capability: (8, 0) for an A100
    used_bytes: int = 0  # by processes that run now
