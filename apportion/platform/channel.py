"""A process group that weights are broadcast over: the trainer's first rank and every worker of every rollout engine.

It stands beside the groups that DeepSpeed and vLLM make for themselves. Between GPUs it is NCCL, from one device's memory
to another's; on CPU it is gloo over the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True)
class ChannelAddress:
    """Where the members meet, and how many they are. The trainer is member 0."""

    host: str
    port: int
    members: int
    backend: str
    timeout_seconds: float  # of joining, and of each broadcast

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: got {self.backend!r}, expected one of {', '.join(BACKENDS)}")


class WeightChannel:
    """One member. Joining returns once all have joined, and raises when that takes too long."""

    def __init__(self, address: ChannelAddress, member: int, device: torch.device | str) -> None:
        from torch import distributed

        limit = timedelta(seconds=address.timeout_seconds)
        store = distributed.TCPStore(address.host, address.port, address.members, member == 0, limit)
        self.device = torch.device(device)
        self._limit = limit
        self._group: Any
        if address.backend == "nccl":
            torch.cuda.set_device(self.device)
            self._group = distributed.ProcessGroupNCCL(store, member, address.members)
        else:
            self._group = distributed.ProcessGroupGloo(store, member, address.members, limit)

    def broadcast(self, tensor: Tensor) -> None:
        """Member 0's tensor into everyone's, in place; returns when it is there."""
        from torch import distributed

        options = distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait(self._limit)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
