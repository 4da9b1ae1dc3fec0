"""The memory that actors take on their GPUs, asked for after each step."""

from __future__ import annotations

from collections.abc import Sequence

from apportion.platform.cluster import Actor, gather
from apportion.platform.device_memory import DeviceMemory, most

MIB, GIB = 2**20, 2**30


class DevicePeaks:
    """Of `actors`, which have a GPU each; where there are none, nothing is asked. `mib` is the largest peak of each so far,
    by name."""

    def __init__(self, actors: Sequence[Actor] = (), timeout_seconds: float = 0.0) -> None:
        self.mib: dict[str, float] = {}
        self._actors, self._seconds = actors, timeout_seconds

    def measure(self) -> dict[str, float]:
        """Metrics of the time since the last call: the largest peak of each role, and the fullest device."""
        calls = [actor.call("device_memory") for actor in self._actors]
        answers: list[DeviceMemory | None] = gather(calls, self._seconds, "GPU memory") if calls else []
        roles: dict[str, list[DeviceMemory]] = {}
        for actor, answer in zip(self._actors, answers, strict=True):
            if answer is not None:
                self.mib[actor.name] = max(self.mib.get(actor.name, 0.0), answer.peak / MIB)
                roles.setdefault(actor.name.rpartition("-")[0], []).append(answer)
        metrics = {f"gpu/{role}_gib": max(m.peak for m in several) / GIB for role, several in roles.items()}
        fullest = most(answers)
        return metrics | ({} if fullest is None else {"gpu/used_gib": fullest.used / GIB})
