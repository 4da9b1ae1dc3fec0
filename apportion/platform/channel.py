"""A process group that weights are broadcast over: the trainer's first rank and every worker of every rollout engine.

It stands beside the groups that DeepSpeed and vLLM make for themselves. Between GPUs it is NCCL, from one device's memory
to another's; on CPU it is gloo over the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from apportion.platform.errors import WeightSyncError
from apportion.platform.rendezvous import open_store

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
    """One member. WeightSyncError when the others are too late: with gloo at joining, with NCCL at the first broadcast."""

    def __init__(self, address: ChannelAddress, member: int, device: torch.device | str) -> None:
        from torch import distributed

        limit = timedelta(seconds=address.timeout_seconds)
        self.device = torch.device(device)
        self._address, self._limit = address, limit
        self._group: Any
        with self._explained():
            store = open_store(address.host, address.port, address.members, member == 0, limit)
            if address.backend == "nccl":
                torch.cuda.set_device(self.device)
                options = distributed.ProcessGroupNCCL.Options()
                options._timeout = limit
                self._group = distributed.ProcessGroupNCCL(store, member, address.members, options)
            else:
                self._group = distributed.ProcessGroupGloo(store, member, address.members, limit)

    def broadcast(self, tensor: Tensor) -> None:
        """Member 0's tensor into everyone's, in place; returns when it is there."""
        from torch import distributed

        options = distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        with self._explained():
            self._group.broadcast([tensor], options).wait(self._limit)
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """torch's errors here say neither what was wanted nor what to do."""
        try:
            yield
        except RuntimeError as error:
            a, said = self._address, (str(error).strip().splitlines() or ["no message"])[0]
            raise WeightSyncError(
                f"cluster.weight_transfer: got no broadcast among {a.members} members at {a.host}:{a.port} within "
                f"{a.timeout_seconds:g} s ({said}), expected all of them; see that the nodes reach each other, or take "
                "object_store"
            ) from error
