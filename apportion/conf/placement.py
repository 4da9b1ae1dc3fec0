"""Lay the actors of a run out over GPUs as Ray counts them: whole GPUs are exclusive, parts of one are packed, and all GPUs
of an actor are on one node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from apportion.conf.gpu_memory import GIB, firm
from apportion.platform.cuda import Gpu


@dataclass(frozen=True)
class Tenant:
    """`count` actors of one role, each with `gpus`. `memory` is bytes on each of these, by purpose."""

    role: str
    count: int
    gpus: float
    memory: dict[str, int]
    start: int = 0  # bytes while it starts, where that may be more
    known: bool = True  # False: the model's size is not known

    @property
    def bytes(self) -> int:
        return max(sum(self.memory.values()), self.start)

    @property
    def firm_bytes(self) -> int:
        return max(firm(self.memory), self.start)


@dataclass(frozen=True)
class GpuUse:
    """`count` GPUs with the same tenants. `gpu` is None where nothing is known of it."""

    count: int
    tenants: tuple[Tenant, ...]
    gpu: Gpu | None = field(default=None)

    @property
    def bytes(self) -> int:
        return sum(tenant.bytes for tenant in self.tenants)

    @property
    def firm_bytes(self) -> int:
        return sum(tenant.firm_bytes for tenant in self.tenants)


def place(tenants: Sequence[Tenant], nodes: int, gpus: int, gpu: Gpu | None = None) -> list[GpuUse] | None:
    """What each GPU of so many nodes with so many each holds, equal ones together; None where there is no room.

    >>> policy, engine = Tenant("policy", 1, 0.5, {}), Tenant("rollout", 3, 0.5, {})
    >>> [(use.count, [t.role for t in use.tenants]) for use in place([policy, engine], 1, 2)]
    [(1, ['policy', 'rollout']), (1, ['rollout', 'rollout'])]
    """
    whole = sorted((t for t in tenants for _ in range(t.count) if t.gpus >= 1), key=lambda t: -t.gpus)
    parts = sorted((t for t in tenants for _ in range(t.count) if 0 < t.gpus < 1), key=lambda t: -t.gpus)
    left, held = [gpus] * nodes, []
    for tenant in whole:
        node = next((i for i, free in enumerate(left) if free >= tenant.gpus), None)
        if node is None:
            return None
        left[node] -= int(tenant.gpus)
        held += [(tenant,)] * int(tenant.gpus)
    shared: list[list[Tenant]] = [[] for _ in range(sum(left))]
    for tenant in parts:
        room = (s for s in shared if sum(t.gpus for t in s) + tenant.gpus <= 1 + 1e-9)
        found = next(room, None)
        if found is None:
            return None
        found.append(tenant)
    groups = Counter(tuple(t.role for t in on) for on in [*held, *shared] if on)
    by_roles = {tuple(t.role for t in on): tuple(on) for on in [*held, *shared]}
    return [GpuUse(count, by_roles[roles], gpu) for roles, count in groups.items()]


def firm_bytes(uses: Sequence[GpuUse]) -> list[int]:
    """What is certain to be taken of each GPU, in the order in which Ray gives them out: engines start first.

    >>> policy, engine = Tenant("policy", 1, 1, {"weights": 3}), Tenant("rollout", 2, 1, {"cache": 5})
    >>> firm_bytes(place([policy, engine], 1, 3))
    [5, 5, 3]
    """
    engines_first = sorted(uses, key=lambda use: all(tenant.role != "rollout" for tenant in use.tenants))
    return [use.firm_bytes for use in engines_first for _ in range(use.count)]


def gpu_lines(uses: Sequence[GpuUse]) -> list[str]:
    """The plan's section, none where no role has a GPU."""
    if not uses:
        return []
    lines = ["", "GPU memory"]
    for use in uses:
        name = "GPU" if use.gpu is None else f"{use.gpu.name} ({size(use.gpu.memory_bytes)})"
        left = ""
        if use.gpu is not None:
            rest = use.gpu.memory_bytes - use.bytes
            left = f", {size(rest)} left" if rest >= 0 else f", {size(-rest)} too much"
        lines.append(f"  {use.count} x {name}: {size(use.bytes)}{left}")
        for tenant in use.tenants:
            lines.append(f"    {tenant.role:<11} {_tenant_text(tenant)}")
    return lines


def _tenant_text(tenant: Tenant) -> str:
    parts = " + ".join(f"{name} {size(amount)}" for name, amount in tenant.memory.items() if amount >= GIB // 100)
    text = f"{size(sum(tenant.memory.values()))} = {parts}"
    if not tenant.known:
        text += "; the model's size is not known"
    if tenant.start > sum(tenant.memory.values()):
        text += f"; {size(tenant.start)} while it starts, with the whole model"
    return text


def size(amount: int) -> str:
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / 2**20:.0f} MiB"
