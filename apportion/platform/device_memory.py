"""How much memory of its GPU a process takes. Asks torch only where it runs on a GPU already."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple


class DeviceMemory(NamedTuple):
    """Bytes of one process."""

    peak: int  # most that its allocator has reserved since it was last asked
    used: int  # of its device, by all processes, now


def device_memory() -> DeviceMemory | None:
    """Of this process; None where it has no CUDA context. Neither imports torch nor starts CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    free, total = torch.cuda.mem_get_info()
    return DeviceMemory(int(peak), int(total - free))


def most(several: Iterable[DeviceMemory | tuple[int, int] | None]) -> DeviceMemory | None:
    """The largest of several processes' numbers; None where nobody has any.

    >>> most([(3, 8), None, (5, 7)])
    DeviceMemory(peak=5, used=8)
    """
    known = [DeviceMemory(*one) for one in several if one is not None]
    return DeviceMemory(max(m.peak for m in known), max(m.used for m in known)) if known else None
